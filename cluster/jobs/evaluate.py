"""Evaluation on Ray: what `python -m training evaluate` does, with a task for each set of weights; what has been scored
already is not scored again, so that killed and started again it goes on."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.core.arguments import EvaluateJob
from cluster.core.devices import Kind, decide, hidden, offered, own_device
from cluster.core.job_paths import refuse_relative
from cluster.core.session import LOCAL, chosen_address, prepare, ray_session, result
from datapipe.core import cli
from datapipe.core.resource_limits import available_cores
from datapipe.storage import full_url
from training.commands.evaluate import conclude, fine_tuning, of_features, show, writing, zero_shot_tasks
from training.core.devices import Device, choose_device
from training.evaluation import evaluation
from training.evaluation.evaluation import ScoringTask
from training.grid.request import read_address
from training.reid.settings import RANDOM

PROG = "python -m cluster evaluate"
POLL_S = 1.0
"""Seconds between looks for what tasks say."""


def evaluate(chosen: EvaluateJob, flags: Sequence[str]) -> int:
    """Score weights as they are, or after fine-tuning with these flags of a recipe; the exit code."""
    refuse_relative(chosen.places)
    address = chosen_address(chosen.address or "")
    weights, data = (tuple(map(_absolute, words)) for words in (chosen.weights, chosen.data))
    features, out = (full_url(place) if place else "" for place in (chosen.features, chosen.out))
    chosen = replace(chosen, weights=weights, features=features, data=data, out=out)
    if chosen.features:
        return show(chosen, [of_features(chosen)])  # ranking alone: no work for a cluster
    if chosen.is_grid or chosen.dry_run:
        from cluster.jobs.evaluate_grid import evaluate_grid

        return evaluate_grid(chosen, flags, address=address, prog=PROG)
    if chosen.task != "zero-shot":
        from cluster.jobs.pretrain import run as pretrain

        with writing(chosen, has_workers=True) as lease:
            config = fine_tuning(chosen, flags, prog=PROG)
            code = pretrain(config, address=address, lease=lease)
            return conclude(config) if code == cli.COMPLETE else code
    if address == LOCAL:
        choose_device(chosen.device)  # refuses what cannot be before the data is looked through
    print(f"reads the data set {chosen.only_data}", flush=True)
    return show(chosen, score_all(zero_shot_tasks(chosen), address=address, device=chosen.device))


def _absolute(word: str) -> str:
    """`NAME=ADDRESS` or an address, where workers run in other folders."""
    given = read_address(word)
    return word if given.address == RANDOM else str(given._replace(address=full_url(given.address)))


def score_all(tasks: Sequence[ScoringTask], *, address: str = LOCAL, device: Device = "auto") -> list[dict[str, Any]]:
    """Score them all, each on a GPU of its own where the cluster has or can start any; their metrics in that order,
    without those of checkpoints that their run has pruned meanwhile.

    Raises ConfigError where a GPU is asked for, and none is there that torch can use.
    """
    with ray_session(address, cpus=available_cores()):
        import ray

        choice = decide(device, offered(embedded=address == LOCAL))
        print(f"device: {choice.kind} ({choice.why})", flush=True)
        if unused := hidden(choice, device):
            print(unused, flush=True)
        gpus = 1 if choice.kind == "cuda" else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_score)
        lines: Any = ray.remote(num_cpus=0)(Lines).remote()
        waiting = {remote.remote(task, choice.kind, lines): task for task in tasks}
        print(f"scores {len(waiting)} sets of weights", flush=True)
        results: dict[str, dict[str, Any]] = {}
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for line in ray.get(lines.take.remote()):
                print(line, file=sys.stderr, flush=True)
            if not finished:
                continue
            (done,) = finished
            task = waiting.pop(done)
            with evaluation.passing_over_pruned(task):
                scores = results[task.weights.name] = result(done)
                mean = 100 * evaluation.headline(scores)["mAP"]
                print(f"scored {task.weights.name}: mAP {mean:.1f}  ({len(results)} of {len(tasks)})", flush=True)
    return [results[task.weights.name] for task in tasks if task.weights.name in results]


class Lines:
    """What tasks say of their progress, until the driver takes it; an actor."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def show_line(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines that came since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _score(task: ScoringTask, kind: Kind, lines: Any) -> dict[str, Any]:
    prepare()
    import torch

    from datapipe.core.process_setup import numbers_in_environment
    from datapipe.core.progress import lines_sent_to

    torch.set_num_threads(1)
    with numbers_in_environment(), lines_sent_to(lines.show_line.remote):
        return evaluation.score(task, threads=1, device=own_device(kind))
