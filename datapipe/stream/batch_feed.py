"""A thread that works out which samples come next and has their batches begun, so that who consumes them only waits."""

from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

from datapipe.sampling.rank_assignment import RankBatch

T = TypeVar("T")


class BatchFeed(Generic[T]):
    """`begin(share)` for the first `count` of the shares, each in its turn and as soon as there is room for it, in a
    thread of its own; `take` hands over what that returned, in order.

    Each share is worked out once, `distance` batches before its batch is begun, and `ahead(share)` is called then.
    `room`: batches that may be begun before one is
    taken. `close` it: it ends the thread.
    """

    def __init__(
        self, shares: Iterator[RankBatch], begin: Callable[[RankBatch], T], *, count: int, room: int,
        ahead: Callable[[RankBatch], None] | None = None, distance: int = 0,
    ) -> None:  # fmt: skip
        self._shares, self._begin, self._ahead = shares, begin, ahead
        self._count, self._distance = count, distance if ahead else 0
        self._room, self._made, self._closed = Semaphore(room), SimpleQueue[T | BaseException](), False
        self._known: deque[RankBatch] = deque()
        self._seen: deque[T | BaseException] = deque()
        self._worked_out = 0
        self._thread = Thread(target=self._run, name="datapipe-order", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """One more batch may be begun."""
        self._room.release()

    def take(self) -> T:
        """What was begun next, as soon as it is. Raises what ended the thread."""
        made = self._seen.popleft() if self._seen else self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def peek(self) -> T | None:
        """What `take` would hand over at once; None where it would wait or raise."""
        if not self._seen and not self._made.empty():
            self._seen.append(self._made.get())
        made = self._seen[0] if self._seen else None
        return None if isinstance(made, BaseException) else made

    def close(self) -> list[T]:
        """End the thread; what was begun and not taken."""
        self._closed = True
        self._room.release()
        self._thread.join()
        left = [*self._seen]
        while not self._made.empty():
            left.append(self._made.get())
        return [made for made in left if not isinstance(made, BaseException)]

    def _run(self) -> None:
        try:
            for number in range(self._count):
                if not self._known:
                    self._work_out()
                while not self._room.acquire(blocking=self._worked_out > number + self._distance):
                    self._work_out()  # something to do until there is room
                if self._closed:
                    return
                self._made.put(self._begin(self._known.popleft()))
        except BaseException as error:
            self._made.put(error)

    def _work_out(self) -> None:
        share = next(self._shares)
        self._known.append(share)
        if self._ahead is not None:
            self._ahead(share)
        self._worked_out += 1
