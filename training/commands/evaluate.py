"""python -m training evaluate: scores of weights on a labelled data set, as they are or after fine-tuning."""

import contextlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import tyro

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.core.resource_limits import available_cores
from datapipe.core.settings import settings
from training.config.run_config import RunConfig
from training.core.devices import choose_device
from training.core.host import LocalHost, exit_code
from training.core.run_folder import crash_log
from training.core.run_folder.lease import Lease, lease_on
from training.core.run_folder.run_folder import RunFolder
from training.core.world import alone
from training.evaluation import evaluation, fine_tune
from training.evaluation.evaluation import Task
from training.reid.settings import ScoringConfig
from training.report.report import write_report
from training.trainer.milestones import SUMMARY
from training.trainer.pretrain import pretrain
from training.weights.safe_load import FILES

PROG = "python -m training evaluate"


@settings
class EvaluateCommand:
    weights: tyro.conf.Positional[str]
    """Run folder, folder of an export or import, or a file of published weights, local or s3://bucket/prefix;
    "random" with --task supervised: none."""
    data: str
    """Labelled data set: a folder or s3://bucket/prefix with its files, or its shards."""
    task: Literal["zero-shot", "supervised"] = "zero-shot"
    """"zero-shot": retrieval with the features as they are. "supervised": fine-tune on the training part first; all
    flags of a recipe may follow, such as --optimisation.epochs 60."""
    out: str = ""
    """Folder for the scores; for --task supervised the run folder. Empty: that of the weights."""
    recipe: str = ""
    """Of fine-tuning: a TOML file, or supervised, supervised_384, supervised_pass, supervised_mae. Empty: the one that
    suits the weights."""
    label_fraction: float = 1.0
    """Share of the training identities that fine-tuning may use."""
    device: Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(aliases=("--engine.device",))] = "auto"
    """"auto": a GPU where there is one; "cuda": an error where there is none."""
    scoring: Annotated[ScoringConfig, tyro.conf.arg(name="")] = ScoringConfig()
    """How the data set is taken and scored."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval: a run's checkpoints beside baselines, an export, a file; or after fine-tuning."""
    chosen, flags = tyro.cli(EvaluateCommand, args=arguments, prog=PROG, return_unknown_args=True)
    if chosen.task == "supervised":
        with writing(chosen, has_workers=False) as guard:
            config = fine_tuning(chosen, flags, prog=PROG)
            with (
                LocalHost(starting=True) as host,
                crash_log.kept(config.out, config.storage, 0, log=True),
                alone(config.engine.device, group=config.engine.stepper == "deepspeed") as world,
            ):
                ending = pretrain(config, world=world, host=host, guard=guard)
            return conclude(config) if ending.complete else exit_code(host.received)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # of quotas PyTorch knows nothing
    device = choose_device(chosen.device)
    print(f"reads the data set {chosen.data}", flush=True)
    scores, tasks = [], zero_shot_tasks(chosen, flags, prog=PROG)
    for number, task in enumerate(tasks, start=1):
        print(f"scores {task.weights.name} ({number} of {len(tasks)})", flush=True)
        scores.append(evaluation.score(task, device=device))
    return show(chosen, scores)


def zero_shot_tasks(chosen: EvaluateCommand, flags: Sequence[str], *, prog: str) -> list[Task]:
    """What there is to score; raises UserError for all that can be wrong before that."""
    if flags:
        raise ConfigError(f"unknown: {' '.join(flags)}", where=prog, hint="--help lists what there is")
    weights = chosen.weights
    if weights.endswith(FILES):
        if not chosen.out:
            raise ConfigError("scores of a file need a folder", where="--out", hint="--out scores/market1501")
        weights = fine_tune.as_export(weights, chosen.out, chosen.storage)
    return evaluation.tasks(weights, chosen.data, chosen.storage, chosen.scoring, out=chosen.out)


def show(chosen: EvaluateCommand, scores: list[dict[str, Any]]) -> int:
    """Print the table of scores and write the report of the folder that holds them."""
    print(evaluation.table(scores))
    print(write_report(chosen.out or evaluation.checkpoint_of(chosen.weights)[0], chosen.storage))
    return cli.COMPLETE


def writing(chosen: EvaluateCommand, *, has_workers: bool) -> contextlib.AbstractContextManager[Lease | None]:
    """The lease on the run folder of fine-tuning, before anything is written to it; nothing where none was given, which
    is refused later. Raises LeaseError where another process has it."""
    if not chosen.out:
        return contextlib.nullcontext()
    return lease_on(chosen.out, chosen.storage, has_workers=has_workers)


def fine_tuning(chosen: EvaluateCommand, flags: Sequence[str], *, prog: str) -> RunConfig:
    """The run that fine-tunes and scores itself."""
    fraction = ["--method.label-fraction", str(chosen.label_fraction)] if chosen.label_fraction < 1 else []
    device = ["--engine.device", chosen.device] if chosen.device != "auto" else []
    return fine_tune.prepare(chosen.weights, chosen.data, chosen.out, recipe=chosen.recipe,
                              flags=[*fraction, *device, *flags],
                              scoring=chosen.scoring, storage=chosen.storage, prog=prog)  # fmt: skip


def conclude(config: RunConfig) -> int:
    """Print the last and the best score of a complete run, and which of them is the result; write its report."""
    found = json.loads(RunFolder(config.out, config.storage).store.read(SUMMARY))
    shown = {found[which]["weights"]: found[which] for which in ("last", "best")}
    print(evaluation.table(list(shown.values())))
    print(f"result: {found['result']['weights']}, {found['rule']}")
    print(write_report(config.out, config.storage))
    return cli.COMPLETE
