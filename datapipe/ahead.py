"""Requests ahead of whoever needs the answers, which come in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


def in_order(work: Callable[[Ask], Answer], asks: Iterable[Ask], *, threads: int) -> Iterator[Answer]:
    """`work` of each, in order, by so many threads at a time; no more answers than that wait. The first error is raised
    in its turn, and what is then still to be done is left. `threads` 0: one after the other, in this thread."""
    if not threads:
        yield from map(work, asks)
        return
    with ThreadPoolExecutor(threads, "datapipe-ahead") as pool:
        yield from results((pool.submit(work, ask) for ask in asks), most=threads)


def results(futures: Iterable[Future[Answer]], *, most: int) -> Iterator[Answer]:
    """What they give, in order. `futures` makes each of them when it is asked for, and no more than `most` are there at
    a time; those that are left when it ends early are cancelled."""
    coming: deque[Future[Answer]] = deque()
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
