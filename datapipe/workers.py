"""Work spread over processes: results in the order of the tasks, few tasks waiting, and none that outlives the run."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from datapipe.errors import ClusterError

T = TypeVar("T")
TASKS_PER_WORKER = 2


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, workers: int) -> Iterator[T]:
    """`function(*task)` for every task, in order; at most two tasks per worker are begun ahead of the reader.

    One worker is this very process. Raises what a task raises, ClusterError where a worker was killed.
    """
    if workers == 1:
        for task in tasks:
            yield function(*task)
        return
    context = multiprocessing.get_context("spawn")  # threads of ours would not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            if len(waiting) >= TASKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ClusterError("a worker process was killed, probably for want of memory",
                           hint="run the same command again, it goes on where it stopped; --workers takes fewer"
                           ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In each worker: Ctrl-C is the parent's to handle, and a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
