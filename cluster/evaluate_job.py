"""Evaluation as Ray tasks: one for each set of weights; what has been scored already is not scored again."""

import sys
from collections.abc import Sequence
from typing import Any

from cluster.devices import Kind, decide, hidden, offered, own_device
from cluster.session import LOCAL, prepare, ray_session, result
from datapipe.resource_limits import available_cores
from training import evaluation
from training.engine.devices import Device
from training.evaluation import Task

POLL_S = 1.0
"""Seconds between looks for what tasks say."""


def run(tasks: Sequence[Task], *, address: str = LOCAL, device: Device = "auto") -> list[dict[str, Any]]:
    """Score them all, each on a GPU of its own where the cluster has or can start any; their metrics in that order.

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
        found: dict[str, dict[str, Any]] = {}
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for line in ray.get(lines.take.remote()):
                print(line, file=sys.stderr, flush=True)
            if not finished:
                continue
            (done,) = finished
            task = waiting.pop(done)
            scores = found[task.weights.name] = result(done)
            mean = 100 * evaluation.headline(scores)["mAP"]
            print(f"scored {task.weights.name}: mAP {mean:.1f}  ({len(found)} of {len(tasks)})", flush=True)
    return [found[task.weights.name] for task in tasks]


class Lines:
    """What tasks say of their progress, until the driver takes it; an actor."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """Those since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _score(task: Task, kind: Kind, lines: Any) -> dict[str, Any]:
    prepare()
    import torch

    from datapipe.progress import telling

    torch.set_num_threads(1)
    with telling(lines.say.remote):
        return evaluation.score(task, threads=1, device=own_device(kind))
