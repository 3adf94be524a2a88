"""What a store is asked for, through a `FaultyProxy`: each request is counted, may be delayed or held until it is let
go, or made to wait until so many others are under way.

    watch = WatchedRequests(delay_s=0.04)
    with FaultyProxy(s3.endpoint, before=watch) as proxy:
        ...
    assert watch.count("GET") == 3 and watch.most_in_flight == 3
"""

import re
import time
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Condition

PATIENCE_S = 300.0


class WatchedRequests:
    """Safe to be called from the threads of a proxy."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        """Every request takes so much longer."""
        self.made: list[tuple[str, str]] = []
        """(method, path with its query) in the order in which they came."""
        self.most_in_flight = 0
        """Of those that this waits for."""
        self._changed, self._in_flight = Condition(), 0
        self._wanted: re.Pattern[str] | None = None
        self._held = 0
        self._meeting: tuple[re.Pattern[str], Barrier] | None = None
        self._to_meet = 0

    def __call__(self, method: str, path: str) -> None:
        request = f"{method} {path}"
        with self._changed:
            self.made.append((method, path))
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            if self._wanted is not None and self._wanted.search(request):
                self._held += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._held, PATIENCE_S)
            barrier = self._barrier(request)
        if barrier is not None:
            with suppress(BrokenBarrierError):
                barrier.wait(PATIENCE_S)
        time.sleep(self.delay_s)
        with self._changed:
            self._in_flight -= 1

    def _barrier(self, request: str) -> Barrier | None:
        if not self._to_meet or self._meeting is None or not self._meeting[0].search(request):
            return None
        self._to_meet -= 1
        return self._meeting[1]

    def count(self, method: str = "", path: str = "") -> int:
        """Requests so far of a method, with a path that this pattern is found in."""
        return sum(made.startswith(method) and re.search(path, asked) is not None for made, asked in list(self.made))

    def hold(self, wanted: str) -> None:
        """From now on requests wait in which this pattern is found: "POST .*delete"."""
        self._wanted = re.compile(wanted)

    def await_held(self) -> None:
        """Return once a request is held."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._held, PATIENCE_S), "no such request comes"

    def release(self) -> None:
        """Let the held ones go on, and all others."""
        with self._changed:
            self._wanted, self._held = None, 0
            self._changed.notify_all()

    def meet(self, wanted: str, parties: int) -> None:
        """The next so many requests in which this pattern is found wait for one another: they hang where not so many
        are made at the same time."""
        self._meeting, self._to_meet = (re.compile(wanted), Barrier(parties)), parties
