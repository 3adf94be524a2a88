"""Evaluation as Ray tasks: one for each set of weights; what has been scored already is not scored again."""

from collections.abc import Sequence
from typing import Any

from cluster.session import prepare, ray_session, result
from datapipe.cores import available_cores
from training import evaluation
from training.evaluation import Task


def run(tasks: Sequence[Task], *, address: str = "local") -> list[dict[str, Any]]:
    """Score them all, each on a GPU where the cluster has any; their metrics in that order."""
    with ray_session(address, cpus=available_cores()):
        import ray

        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_score)
        waiting = {remote.remote(task): task for task in tasks}
        found: dict[str, dict[str, Any]] = {}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(done)
            scores = found[task.weights.name] = result(done)
            mean = 100 * evaluation.headline(scores)["mAP"]
            print(f"scored {task.weights.name}: mAP {mean:.1f}  ({len(found)} of {len(tasks)})", flush=True)
    return [found[task.weights.name] for task in tasks]


def _score(task: Task) -> dict[str, Any]:
    prepare()
    import torch

    from training.engine.world import choose_device

    torch.set_num_threads(1)
    return evaluation.score(task, threads=1, device=choose_device("auto", 0))
