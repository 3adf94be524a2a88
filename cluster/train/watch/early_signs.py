"""A worker's signs of life before it meets the others and imports what it trains with, until its host takes over."""

import os
import threading
import time
from typing import Any

import ray

from cluster.train.watch.hang_detection import Pulse
from datapipe.core.progress import WorkDone, work_done

EVERY_S = 1.0
"""Seconds between signs."""


class Advance:
    """Since when a process has imported and read nothing more."""

    def __init__(self) -> None:
        self._done, self._since = work_done(), time.monotonic()

    def look(self) -> tuple[WorkDone, float]:
        """What has been done so far, and the seconds since it was less."""
        done = work_done()
        if done != self._done:
            self._done, self._since = done, time.monotonic()
        return done, time.monotonic() - self._since


class EarlySigns:
    """Tells the coordinator, in a thread of its own, how much this process has imported and read."""

    def __init__(self, coordinator: Any, group: int, rank: int) -> None:
        self._coordinator, self._group, self._rank = coordinator, group, rank
        self._over = threading.Event()
        threading.Thread(target=self._live, name="early signs of life", daemon=True).start()

    def _live(self) -> None:
        advance = Advance()
        while not self._over.is_set():
            done, stood_s = advance.look()
            pulse = Pulse(self._rank, 0, "data", stood_s, 0.0, False, so_far=str(done))
            try:
                word = ray.get(self._coordinator.beat.remote(self._group, pulse))
            except (ray.exceptions.RayError, RuntimeError):
                return  # the driver is gone, and this process will be ended with it
            if word == "end":
                os._exit(1)  # another group works on the same run
            self._over.wait(EVERY_S)

    def end(self) -> None:
        """Another thread gives signs from now on, or the work is over."""
        self._over.set()


_signs: list[EarlySigns] = []
"""In a worker's process, until the host takes over."""


def begin(coordinator: Any, group: int, rank: int) -> None:
    """In a worker, before what it has to import. `group`: as the coordinator counts them."""
    end()
    _signs.append(EarlySigns(coordinator, group, rank))


def end() -> None:
    """In a worker: its host gives signs of life from now on."""
    while _signs:
        _signs.pop().end()
