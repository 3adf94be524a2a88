"""Evaluation as Ray tasks: one for each set of weights; what has been scored already is not scored again."""

import os
from typing import Any

from cluster.session import prepare, ray_session, result
from datapipe.config import StorageConfig
from datapipe.storage import is_remote
from training import evaluation
from training.evaluation import Task
from training.reid.scoring import ScoringConfig


def run(
    run_folder: str, data: str, *, storage: StorageConfig, scoring: ScoringConfig, address: str = "local"
) -> list[dict[str, Any]]:
    """Score the colour histogram, random weights and every kept checkpoint; their metrics in that order."""
    run_folder, data = (place if is_remote(place) else os.path.abspath(place) for place in (run_folder, data))
    tasks = evaluation.tasks(run_folder, data, storage, scoring)
    cores = os.cpu_count() or 1
    with ray_session(address, cpus=cores):
        import ray

        remote = ray.remote(num_cpus=1, max_retries=3)(_score)
        waiting = {remote.remote(task): task for task in tasks}
        found: dict[str, dict[str, Any]] = {}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(done)
            scores = result(done)
            found[task.weights.name] = scores
            best = scores["features"][scores["headline"]]
            counted = f"{len(found)} of {len(tasks)}"
            print(f"scored {task.weights.name}: mAP {100 * best['mAP']:.1f}  ({counted})", flush=True)
    return [found[task.weights.name] for task in tasks]


def _score(task: Task) -> dict[str, Any]:
    prepare()
    import torch

    torch.set_num_threads(1)
    return evaluation.score(task, threads=1)
