"""A budget of requests: no more of them begin in a second than a store is to be asked for."""

from collections.abc import Callable
from threading import Event, Lock
from time import monotonic


class Pace:
    """Lets `per_s` requests a second begin, first come, first served; after a pause as many at once as a second allows.
    0: as many as come. For many threads."""

    def __init__(self, per_s: float, clock: Callable[[], float] = monotonic) -> None:
        if per_s < 0:
            raise ValueError(f"{per_s} requests a second")
        self._each_s = 1 / per_s if per_s else 0.0
        self._clock, self._lock, self._ended = clock, Lock(), Event()
        self._free = clock()
        """When the next one may begin."""

    def wait(self) -> None:
        """Return when the next request may begin."""
        if (delay := self.delay_s()) > 0:
            self._ended.wait(delay)

    def delay_s(self) -> float:
        """Take the next turn; seconds until it comes."""
        if not self._each_s:
            return 0.0
        with self._lock:
            now = self._clock()
            begin = max(self._free, now - max(0.0, 1 - self._each_s))
            self._free = begin + self._each_s
        return max(0.0, begin - now)

    def end(self) -> None:
        """Nobody waits any longer."""
        if self._each_s:
            self._ended.set()


UNLIMITED = Pace(0)
