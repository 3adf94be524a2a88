"""Work spread over threads or processes: results in the order of the tasks, few waiting, none that outlives the run."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

from datapipe.core.errors import ClusterError
from datapipe.core.process_setup import show_control_characters
from datapipe.core.resource_limits import available_cores
from datapipe.core.stop_signals import sheltered

T = TypeVar("T")
Task = TypeVar("Task")
TASKS_PER_WORKER = 2


def in_order(work: Callable[[Task], T], tasks: Iterable[Task], *, threads: int) -> Iterator[T]:
    """`work` of each, in order, by so many threads at a time; no more answers than that wait. The first error is raised
    in its turn, and what is then still to be done is left. `threads` 0: one after the other, in this thread."""
    if not threads:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads, "datapipe-ahead") as pool:
        yield from results((pool.submit(work, task) for task in tasks), most=threads)


def results(futures: Iterable[Future[T]], *, most: int) -> Iterator[T]:
    """What they give, in order. `futures` makes each of them when it is asked for, and no more than `most` are there at
    a time; those that are left when it ends early are cancelled."""
    coming: deque[Future[T]] = deque()
    try:
        for future in futures:
            coming.append(future)
            if len(coming) == most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


class Executor(Protocol):
    """Whatever carries out tasks: processes of this machine, or those of a cluster."""

    def run(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, count: int) -> Iterator[T]:
        """`function(*task)` for each of the `count` tasks, in their order, few of them ahead of the reader."""


class Workers:
    """Up to `limit` processes (0: one per core), started when there is work for them: `with Workers(8) as workers:`."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit or available_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, count: int) -> Iterator[T]:
        """`function(*task)` for each of the `count` tasks, in order; two per worker at most are ahead of the reader.

        A single task, or all with a limit of one, run in this very process. Raises what a task raises, ClusterError
        where a worker was killed.
        """
        if min(self.limit, count) <= 1:
            for task in tasks:
                yield function(*task)
            return
        futures = (self._submit(function, task) for task in tasks)
        try:
            yield from results(futures, most=TASKS_PER_WORKER * self.limit)
        except BrokenProcessPool as error:
            raise ClusterError(
                "a worker process was killed, probably for want of memory",
                hint="run the same command again, it goes on where it stopped; --workers takes fewer",
            ) from error

    def _submit(self, function: Callable[..., T], task: tuple[Any, ...]) -> "Future[T]":
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # threads of ours would not survive a fork
            self._pool = ProcessPoolExecutor(self.limit, mp_context=context, initializer=follow_parent)
        with sheltered():
            return self._pool.submit(function, *task)


def follow_parent() -> None:
    """In each worker: signals are the parent's to handle, and a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_control_characters()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
