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
    coming: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(threads, "datapipe-ahead") as pool:
        try:
            for ask in asks:
                coming.append(pool.submit(work, ask))
                if len(coming) == threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
