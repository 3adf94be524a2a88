"""Room for workers on a cluster's machines: whether there can be any, whether it is held, what starts there; and giving
it back."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 5.0
"""Seconds for machines to say what starts there."""
HELPERS = ("Controller", "Coordinator", "PreemptionWatcher", "SynchronizationActor", "_amounts")
"""Parts of the names of a run's processes that are no workers."""


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


def started_on(nodes: Iterable[str]) -> dict[str, int]:
    """Machine -> how much the starting workers of this job there have read and hold in memory, in bytes; machines that
    do not answer are left out. What grows does not stand still, though nothing of ours runs in it yet."""
    job = ray.get_runtime_context().get_job_id()
    asked = {
        ray.remote(num_cpus=0, max_retries=0)(_amounts)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True))
        .remote(job): node
        for node in nodes
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = {}
    for answer in done:
        try:
            found[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError:  # the machine is gone
            continue
    return found


def _amounts(job: str) -> int:
    """On a machine: bytes that processes of a job have read, and hold. Of those that are no workers nothing counts."""
    total = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or ())
        if process.pid == os.getpid() or any(part in title for part in HELPERS) or not _of_job(process.pid, job):
            continue
        total += process.info["memory_info"].rss
        try:
            with open(f"/proc/{process.pid}/io", encoding="ascii") as file:
                total += int(file.readline().split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return total


def _of_job(pid: int, job: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables: Sequence[bytes] = file.read().split(b"\0")
    except OSError:
        return False
    return b"RAY_JOB_ID=" + job.encode() in variables
