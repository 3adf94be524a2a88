"""Moments of a run as its storage sees them: before, in and after a save."""

import re
import time
from collections.abc import Callable
from threading import Condition

from tests.cluster.local_nodes import PATIENCE_S

SAVING = re.compile(r"/checkpoints/step_(\d+)/(?!checkpoint\.json)")
"""A part of a checkpoint is written."""
MARKING = re.compile(r"/checkpoints/step_(\d+)/checkpoint\.json")
"""The marker that makes it exist is written: everything else is there."""


class Gate:
    """What a `FaultyProxy` asks before it passes a request on: notes saves, and holds a request when told to."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._wanted: re.Pattern[str] | None = None
        self._skip = 0
        self._drop = False
        self.held: str | None = None
        """The path of the request that is held."""
        self.slow_s = 0.0
        """Every request takes so much longer."""
        self.marked: list[tuple[float, int]] = []
        """(Unix time, step) of each marker that was passed on."""

    def __call__(self, method: str, path: str) -> None:
        time.sleep(self.slow_s)
        if method == "PUT":
            self._hold(path)
            if found := MARKING.search(path):
                self.marked.append((time.time(), int(found[1])))

    def _hold(self, path: str) -> None:
        with self._changed:
            if self._wanted is None or not self._wanted.search(path):
                return
            if self._skip:
                self._skip -= 1
                return
            self._wanted, self.held = None, path
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.held is None, PATIENCE_S)
            if self._drop:
                raise ConnectionAbortedError(f"dropped: {path}")

    def arm(self, wanted: re.Pattern[str], *, skip: int = 0) -> None:
        """The next request of this kind is to be held, or the one after `skip` more."""
        with self._changed:
            self._wanted, self._skip = wanted, skip

    def reached(self, running: Callable[[], bool]) -> int:
        """The step of the checkpoint whose request is held, once it has come. AssertionError where the run ends
        before."""
        end = time.monotonic() + PATIENCE_S
        with self._changed:
            while self.held is None:
                self._changed.wait(0.1)
                ended = not running()
                assert self.held or not ended and time.monotonic() < end, "the request to be held does not come"
            found = SAVING.search(self.held) or MARKING.search(self.held)
        assert found
        return int(found[1])

    def stop(self, wanted: re.Pattern[str], running: Callable[[], bool], *, skip: int = 0) -> int:
        """Hold a request; returns the step of its checkpoint when it has come. See `arm` and `reached`."""
        self.arm(wanted, skip=skip)
        return self.reached(running)

    def open(self, *, drop: bool) -> None:
        """Let the held request go on, or have it never arrive."""
        with self._changed:
            self.held, self._drop = None, drop
            self._changed.notify_all()
