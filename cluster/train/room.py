"""Room for workers on a cluster's machines: whether there can be any, whether it is held, what starts there; and giving
it back."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ASK_S = 20.0
"""Seconds between questions to the machines."""
WORKERS = ("ray::RayTrainWorker", "default_worker.py")
"""In the command lines of processes of workers, and of those that are about to be some."""


def give_back() -> None:
    """Remove the placement groups of this job, and with them what runs there. A controller of Ray Train that died, or
    that could not start workers, still holds them."""
    for identity in _groups():
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))


def held_on() -> set[str]:
    """Ids of the machines on which room for the workers of this job is held; empty while it is waited for."""
    held = [group for group in _groups().values() if group["state"] == "CREATED"]
    return {node for group in held for node in group["bundles_to_node_id"].values()}


def _groups() -> dict[str, Mapping[str, Any]]:
    """This job's placement groups by id, which ends with that of its job."""
    job = ray.get_runtime_context().get_job_id()
    return {identity: group for identity, group in placement_group_table().items()
            if identity.endswith(job) and group["state"] != "REMOVED"}  # fmt: skip


def lacks(nodes: Iterable[Mapping[str, Any]], wanted: Mapping[str, float]) -> str:
    """Why no machine could ever hold one worker, in words; empty: one could, were it free. `nodes`: as `ray.nodes`
    lists them; `wanted`: what Ray sets aside for a worker."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in alive):
        return ""
    each = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    most = ", ".join(f"{max((has.get(name, 0) for has in alive), default=0):g} {name}" for name in wanted)
    return f"a worker needs {each}, and no machine of the cluster has more than {most}"


class StartingProcesses:
    """How much the starting workers on some machines have read and hold in memory: what grows does not stand still,
    though nothing of ours runs in it yet. Asked of the machines now and then; nothing waits for their answers."""

    def __init__(self) -> None:
        self._asked: dict[Any, str] = {}
        self._asked_at = float("-inf")
        self._amounts: dict[str, int] = {}

    def look(self, nodes: Iterable[str]) -> dict[str, int]:
        """Machine -> bytes, as last heard; 0 of machines that have not answered yet."""
        done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for answer in done:
            node = self._asked.pop(answer)
            with contextlib.suppress(ray.exceptions.RayError):  # the machine is gone
                self._amounts[node] = ray.get(answer)
        if time.monotonic() - self._asked_at > ASK_S:
            self._asked_at = time.monotonic()
            task = ray.remote(num_cpus=0, max_retries=0)(_amounts)
            self._asked = {
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
                for node in nodes
            }
        return {node: self._amounts.get(node, 0) for node in nodes}


def _amounts() -> int:
    """On a machine: bytes that processes of Ray Train's workers have read, and hold."""
    total = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or ())
        if process.info["memory_info"] is None or not any(name in title for name in WORKERS):
            continue
        total += process.info["memory_info"].rss
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{process.pid}/io") as file:
            total += int(file.readline().split()[1])
    return total
