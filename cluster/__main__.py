"""python -m cluster demo | shard | pretrain | evaluate | embed | score-cfs | submit | status"""

import sys

from datapipe.core import cli
from datapipe.core.cli import Command

LIBRARIES = "PyTorch and Ray"
COMMANDS = {
    "demo": Command("cluster.commands:demo", "Crops to report on one machine, with a worker killed on the way.",
                    loads="PyTorch", log=True),
    "shard": Command("cluster.commands:shard", "Turn crops into shards as `python -m datapipe shard` does, to the same "
                     "bytes, with all machines of a cluster.", loads="Ray", log=True),
    "pretrain": Command("cluster.commands:pretrain", "Train a recipe with Ray Train and DeepSpeed; crashed workers are "
                        "restarted from the last checkpoint.", loads=LIBRARIES, log=True,
                        quiet=("--json", "--dry-run")),
    "evaluate": Command("cluster.commands:evaluate", "Score weights by retrieval, as they are or after fine-tuning; "
                        "killed and started again it goes on.", loads=LIBRARIES, log=True),
    "embed": Command("cluster.commands:embed", "Write the feature of every image of a data set into one parquet file, "
                     "with all devices of a cluster; killed, it goes on.", loads=LIBRARIES, log=True),
    "score-cfs": Command("cluster.commands:score_cfs", "Score crops by how little of their features a network forgets "
                         "when it is fine-tuned (CFS), and list them best first; killed, it goes on.", loads=LIBRARIES,
                         log=True),
    "submit": Command("cluster.commands:submit", "Hand in pretrain, shard, evaluate, embed or score-cfs as a Ray job; "
                      "prints how to follow, stop and resume it.", loads=LIBRARIES),
    "status": Command("cluster.commands:status", "Show runs: state, last step, age, workers, restarts, checkpoints. "
                      "Reads files alone.", loads="PyTorch"),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Dispatch to a command."""
    return cli.dispatch(COMMANDS, arguments, prog="python -m cluster", extra="cluster")


def console() -> int:
    """The command line of this process; the exit code."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(console())
