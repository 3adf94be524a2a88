"""How far a rank is in its steps, also where its GPU works behind the program that feeds it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

Doing = Literal["data", "forward", "backward"]
"""What a rank is at in a step: waiting for its batch, or saving before that; in its own forward; in what follows, where
it waits for the other ranks, too."""


class Where(NamedTuple):
    """A place in a run, and since when the rank is there."""

    step: int
    """Steps done."""
    doing: Doing
    marks: int
    """Places passed in this step: tells a step's micro-batches apart."""
    stood_s: float


class Whereabouts:
    """The training thread tells places as it comes to them; another thread asks.

    On a GPU the program is ahead: it has launched the backward pass when the forward pass has hardly begun, and tells
    nothing of a GPU that is stuck. There a place counts as reached when the event that was recorded before it has
    happened (`launched`), in the order of launching.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ahead: deque[tuple[int, Doing, Callable[[], bool]]] = deque()
        self._step, self._marks = 0, 0
        self._doing: Doing = "data"
        self._since = time.monotonic()

    def at(self, step: int, doing: Doing) -> None:
        """The rank is there, and so is its device."""
        with self._lock:
            self._ahead.clear()
            self._move(step, doing)

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        """The rank will be there once `reached`, which must not wait, says so."""
        with self._lock:
            self._ahead.append((step, doing, reached))

    def now(self) -> Where:
        with self._lock:
            while self._ahead and _is_reached(self._ahead[0][2]):
                self._move(*self._ahead.popleft()[:2])
            return Where(self._step, self._doing, self._marks, time.monotonic() - self._since)

    def _move(self, step: int, doing: Doing) -> None:
        if step != self._step:
            self._marks = 0
        elif doing != self._doing:
            self._marks += 1
        self._step, self._doing, self._since = step, doing, time.monotonic()


def _is_reached(reached: Callable[[], bool]) -> bool:
    """A device in an error state answers with that error, which the training thread meets, too."""
    try:
        return reached()
    except RuntimeError:
        return False
