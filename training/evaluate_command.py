"""python -m training evaluate: scores of weights on a labelled data set, as they are or after fine-tuning."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from datapipe import command
from datapipe.config import StorageConfig
from datapipe.errors import ConfigError
from datapipe.settings import settings
from datapipe.storage import open_store
from training import evaluation
from training.engine.host import LocalHost, exit_code
from training.engine.world import alone
from training.milestones import SUMMARY
from training.pretrain import pretrain
from training.reid import supervised
from training.reid.scoring import ScoringConfig
from training.run_folder import RunFolder
from training.weight_files import FILES
from training.weights import CARD

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
    scoring: Annotated[ScoringConfig, tyro.conf.arg(name="")] = ScoringConfig()
    """How the data set is taken and scored."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval: a run's checkpoints beside baselines, an export, a file; or after fine-tuning."""
    chosen, flags = tyro.cli(EvaluateCommand, args=arguments, prog=PROG, return_unknown_args=True)
    if chosen.task == "supervised":
        return _fine_tuned(chosen, flags)
    if flags:
        raise ConfigError(f"unknown: {' '.join(flags)}", where=PROG, hint="--help lists what there is")
    print(evaluation.table(_zero_shot(chosen)))
    return command.COMPLETE


def _zero_shot(chosen: EvaluateCommand) -> list[dict[str, Any]]:
    if chosen.weights.endswith(FILES):
        if not chosen.out:
            raise ConfigError("scores of a file need a folder", where="--out", hint="--out scores/market1501")
        export = supervised.as_export(chosen.weights, chosen.out, chosen.storage)
        return [_scored(export, chosen)]
    if open_store(chosen.weights, chosen.storage).exists(CARD):
        return [_scored(chosen.weights, chosen)]
    scores = []
    for task in evaluation.tasks(chosen.weights, chosen.data, chosen.storage, chosen.scoring):
        scores.append(evaluation.score(task))
        print(f"scored {task.weights.name}", flush=True)
    return scores


def _scored(export: str, chosen: EvaluateCommand) -> dict[str, Any]:
    return evaluation.score_export(export, chosen.data, chosen.storage, out=chosen.out, scoring=chosen.scoring)


def _fine_tuned(chosen: EvaluateCommand, flags: Sequence[str]) -> int:
    """Prepare, train to the end or a stop, and print the last and the best score, and which of them is the result."""
    fraction = ["--method.label-fraction", str(chosen.label_fraction)] if chosen.label_fraction < 1 else []
    config = supervised.prepare(chosen.weights, chosen.data, chosen.out, recipe=chosen.recipe,
                                flags=[*fraction, *flags], scoring=chosen.scoring, storage=chosen.storage,
                                prog=PROG)  # fmt: skip
    with LocalHost() as host, alone(config.engine.device, group=config.engine.stepper == "deepspeed") as world:
        ending = pretrain(config, world=world, host=host)
    if not ending.complete:
        return exit_code(host.received)
    found = json.loads(RunFolder(config.out, config.storage).store.read(SUMMARY))
    print(evaluation.table([found["last"], found["best"]]))
    print(f"result: {found['result']['weights']}, {found['rule']}")
    return command.COMPLETE
