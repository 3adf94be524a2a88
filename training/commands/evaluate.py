"""python -m training evaluate: scores of weights on a labelled data set, as they are or after fine-tuning."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from datapipe.core import cli
from datapipe.core.errors import ConfigError
from datapipe.core.resource_limits import available_cores
from training.commands.arguments import EvaluateCommand
from training.config.run_config import RunConfig
from training.core.devices import choose_device
from training.core.host import LocalHost, exit_code
from training.core.run_folder.lease import Lease, lease_on
from training.core.run_folder.run_folder import RunFolder
from training.evaluation import evaluation, fine_tune
from training.evaluation.evaluation import ScoringTask
from training.evaluation.score_features import score_features
from training.grid.request import read_recipes
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.settings import ScoringConfig
from training.report.report import write_report
from training.trainer.milestones import SUMMARY
from training.trainer.pretrain import pretrain_alone
from training.weights.safe_load import is_weights_file

PROG = "python -m training evaluate"


def run(chosen: EvaluateCommand, flags: Sequence[str]) -> int:
    """Score weights as they are, or after training with these flags of a recipe; or a grid of both."""
    if chosen.is_grid or chosen.dry_run:
        from training.commands.evaluate_grid import run as run_grid

        return run_grid(chosen, flags, prog=PROG)
    if chosen.task != "zero-shot":
        with writing(chosen, has_workers=False) as guard:
            config = fine_tuning(chosen, flags, prog=PROG)
            with LocalHost(starting=True) as host:
                ending = pretrain_alone(config, host, guard=guard)
            return conclude(config) if ending.complete else exit_code(host.received)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # of quotas PyTorch knows nothing
    if chosen.features:
        return show(chosen, [of_features(chosen)])
    device = choose_device(chosen.device)
    print(f"reads the data set {chosen.only_data}", flush=True)
    scores, tasks = [], zero_shot_tasks(chosen)
    for number, task in enumerate(tasks, start=1):
        print(f"scores {task.weights.name} ({number} of {len(tasks)})", flush=True)
        with evaluation.passing_over_pruned(task):
            scores.append(evaluation.score(task, device=device))
    return show(chosen, scores)


def of_features(chosen: EvaluateCommand) -> dict[str, Any]:
    """Score a file of features; raises UserError for all that is wrong with it."""
    if not chosen.out:
        raise ConfigError("scores of a file need a folder", where="--out", hint="--out scores/market1501")
    print(f"reads the data set {chosen.only_data} and the features {chosen.features}", flush=True)
    scores, extra = score_features(chosen.features, chosen.only_data, chosen.out, chosen.storage, scoring_of(chosen))
    if extra:
        print(extra)
    return scores


def zero_shot_tasks(chosen: EvaluateCommand) -> list[ScoringTask]:
    """What there is to score; raises UserError for all that can be wrong before that."""
    weights = chosen.only_weights
    if is_weights_file(weights):
        if not chosen.out:
            raise ConfigError("scores of a file need a folder", where="--out", hint="--out scores/market1501")
        weights = fine_tune.as_export(weights, chosen.out, chosen.storage)
    return evaluation.tasks(weights, chosen.only_data, chosen.storage, scoring_of(chosen), out=chosen.out)


def show(chosen: EvaluateCommand, scores: list[dict[str, Any]]) -> int:
    """Print the table of scores and write the report of the folder that holds them."""
    print(evaluation.table(scores))
    print(write_report(chosen.out or evaluation.checkpoint_of(chosen.only_weights)[0], chosen.storage))
    return cli.COMPLETE


def writing(chosen: EvaluateCommand, *, has_workers: bool) -> contextlib.AbstractContextManager[Lease | None]:
    """The lease on the run folder of fine-tuning, before anything is written to it; nothing where none was given, which
    is refused later. Raises LeaseError where another process has it."""
    if not chosen.out:
        return contextlib.nullcontext()
    return lease_on(chosen.out, chosen.storage, has_workers=has_workers)


def fine_tuning(chosen: EvaluateCommand, flags: Sequence[str], *, prog: str) -> RunConfig:
    """The run that fine-tunes and scores itself."""
    (recipe,) = read_recipes(chosen.recipe, chosen.chosen_tasks).values() or ("",)
    return fine_tune.prepare(chosen.only_weights, chosen.only_data, chosen.out, task=chosen.task, recipe=recipe,
                             flags=chosen.recipe_flags(flags)[chosen.task], scoring=scoring_of(chosen),
                             storage=chosen.storage, prog=prog)  # fmt: skip


def scoring_of(chosen: EvaluateCommand) -> ScoringConfig:
    """How the one data set is taken: what its name says it is, where that is the name of a published one."""
    name = chosen.named_data[0].name
    return replace(chosen.scoring, data_name=name) if name in PUBLISHED else chosen.scoring


def conclude(config: RunConfig) -> int:
    """Print the last and the best score of a complete run, and which of them is the result; write its report."""
    summary = RunFolder(config.out, config.storage).store.read_record(SUMMARY)
    shown = {summary[which]["weights"]: summary[which] for which in ("last", "best")}
    print(evaluation.table(list(shown.values())))
    print(f"result: {summary['result']['weights']}, {summary['rule']}")
    print(write_report(config.out, config.storage))
    return cli.COMPLETE
