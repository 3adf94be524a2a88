"""Signs of life of a rank that does something else than training steps, so that it is not taken for one that hangs."""

import contextlib
import threading
from collections.abc import Iterator

from training.core.host import Host

ALIVE_S = 1.0
"""Seconds between signs."""


@contextlib.contextmanager
def alive(host: Host, step: int) -> Iterator[None]:
    """Give the host a sign of life now and then, for as long as the context lasts."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(ALIVE_S):
            host.alive(step, "data")

    thread = threading.Thread(target=report, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
