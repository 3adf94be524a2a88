"""python -m training pretrain | views | checkpoints | evaluate | embed | reproduce | export | import | report | warm"""

import sys

from datapipe.core import cli
from datapipe.core.cli import Command

HERE, TORCH = "training.commands.entry_points", "PyTorch"
COMMANDS = {
    "pretrain": Command(f"{HERE}:pretrain", "Train a recipe in this one process, without Ray; "
                        "`--dry-run` says what it would be and needs.", loads=TORCH, log=True,
                        quiet=("--json", "--dry-run")),
    "views": Command(f"{HERE}:views", "Print the views that a recipe trains on, as JSON for "
                     "`python -m datapipe preview --views FILE`.", loads=TORCH),
    "checkpoints": Command(f"{HERE}:checkpoints", "List, verify, compare or prune a run's "
                           "checkpoints.", loads=TORCH),
    "evaluate": Command(f"{HERE}:evaluate", "Score weights by retrieval: a run's checkpoints beside "
                        "baselines, an export, a file; or after fine-tuning.", loads=TORCH, log=True),
    "embed": Command(f"{HERE}:embed", "Write the feature of every image of a data set into one parquet "
                     "file for other tools; killed, it goes on.", loads=TORCH, log=True),
    "reproduce": Command(f"{HERE}:reproduce", "Carry out a published evaluation and hold ours "
                         "against it: exit code 0 within the tolerance, 1 outside.", loads=TORCH),
    "export": Command(f"{HERE}:export", "Write a checkpoint's backbone for timm, with a card that "
                      "says what it is.", loads=TORCH),
    "import": Command(f"{HERE}:import_published", "Read weights published by others and write their "
                      "backbone as an export, with a card that says where from.", loads=TORCH),
    "report": Command(f"{HERE}:report", "Write report.html, one self-contained file, from what the "
                      "run folder holds.", loads=TORCH),
    "warm": Command(f"{HERE}:warm", "Start DeepSpeed once, with a tiny module, to see that it works "
                    "here.", loads="PyTorch and DeepSpeed"),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Dispatch to a command."""
    return cli.dispatch(COMMANDS, arguments, prog="python -m training", extra="train")


def console() -> int:
    """The command line of this process; the exit code."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(console())
