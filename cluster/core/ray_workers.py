"""Tasks on as many machines as a cluster has, their results in order; and whether these machines see the same files.

What is done is decided elsewhere; here the tasks are carried to other processes and their results back. A killed worker
or node costs the tasks it was at, which start again elsewhere.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from cluster.core.session import result
from cluster.core.shared_paths import Witness, unseen
from datapipe.core.errors import DataError
from datapipe.core.progress import counted

T = TypeVar("T")
TASKS_PER_CPU = 3
"""Tasks given to Ray at a time: one at work, the next ones already there."""
UNREAD_PER_CPU = 30
"""Results that may wait for an earlier, slower task; each is a few hundred bytes."""
LOST_WORKERS = 10
"""Times that one task may lose its worker or node. Tasks are short, so machines that come and go need few."""


class RayWorkers:
    """Runs tasks anywhere in the cluster; what `datapipe.core.parallel.Workers` is on one machine."""

    def __init__(self, limit: int = 0, seen: tuple[Witness, ...] = (), *, gpus: int = 0) -> None:
        """`limit`: tasks at work or waiting at a time; 0: as many as the cluster's CPUs want. `seen`: files that every
        machine must see. `gpus`: of each task."""
        self.limit, self.seen, self.gpus = limit, seen, gpus

    def run(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, count: int) -> Iterator[T]:
        """`function(*task)` for each task, in order; a few per CPU at a time, the cluster's size read again and again.

        Raises what a task raises, DataError where a machine does not see the folders (`seen`), ClusterError where one
        task has lost its worker LOST_WORKERS times.

        Tasks at work when this ends early go with the session. They are not cancelled: Ray 2.60 aborts the whole driver
        where a result arrives just after `ray.cancel` ("Tried to complete task that was not pending").
        """
        import ray

        remote: Any = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=LOST_WORKERS, max_calls=0,
                                 scheduling_strategy="SPREAD")(_perform)  # fmt: skip
        tasks = iter(tasks)
        unread: deque[Any] = deque()
        running: set[Any] = set()
        while True:
            for task in islice(tasks, self._room(len(running), len(unread))):
                unread.append(remote.remote(self.seen, function, task))
                running.add(unread[-1])
            if not unread:
                return
            done, _ = ray.wait(list(running))
            running.difference_update(done)
            while unread and unread[0] not in running:
                yield result(unread.popleft())

    def _room(self, running: int, unread: int) -> int:
        """Tasks that may be given to Ray now."""
        import ray

        cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
        most = self.limit or TASKS_PER_CPU * cpus
        return max(0, min(most - running, most + UNREAD_PER_CPU * cpus - unread))


def _perform(seen: tuple[Witness, ...], function: Callable[..., T], task: tuple[Any, ...]) -> T:
    """One task, in a worker process; its machine may have joined the cluster after the run began."""
    refuse_unseen(seen)
    return function(*task)


def refuse_unseen(seen: tuple[Witness, ...]) -> None:
    """In a worker process: raises DataError where this machine does not see what the driver sees."""
    if missing := unseen(seen):
        raise _refusal({_node(): missing})


def check_nodes(seen: tuple[Witness, ...]) -> None:
    """Ask every machine of the cluster whether it sees what this one sees. Raises DataError where one does not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cpus = sum(node["Resources"]["CPU"] for node in nodes)
    print(f"cluster: {counted(len(nodes), 'machine')}, {cpus:g} CPUs", flush=True)
    ask = ray.remote(num_cpus=0)(_look)
    checks = [ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(seen)
             for node in nodes]  # fmt: skip
    blind = {name: missing for name, missing in map(result, checks) if missing}
    if blind:
        raise _refusal(blind)


def _look(seen: tuple[Witness, ...]) -> tuple[str, tuple[str, ...]]:
    return _node(), unseen(seen)


def _node() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _refusal(blind: dict[str, tuple[str, ...]]) -> DataError:
    places = sorted({place for missing in blind.values() for place in missing})
    return DataError(
        f"not every machine of the cluster sees the same files as this one: {', '.join(sorted(blind))} does not",
        where=", ".join(places),
        hint="give s3://bucket/prefix, or a folder that all machines share under the same path (--spool, too)",
    )
