"""What a run asks of the place it runs in, and tells it. Ray's host lives in `cluster/`."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

from datapipe.command import COMPLETE, INTERRUPTED, STOPPED
from training.engine.whereabouts import Doing


class Host(Protocol):
    """The scheduler's side of a run."""

    def place(self) -> str:
        """The machine that this rank is on, in a person's terms."""
        ...

    def alive(self, step: int, doing: Doing) -> None:
        """This rank has come so far: `step` steps are done. Cheap; called a few times in each step."""
        ...

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        """The same where the work is a GPU's: it has come so far once `reached`, asked from any thread, says so."""
        ...

    def preempted(self) -> bool:
        """True when this process was told to save and end. Cheap; asked at every step, may differ between ranks."""
        ...

    def saved(self, step: int) -> None:
        """A checkpoint of `step` exists. Called on every rank, equally often."""
        ...

    def say(self, line: str) -> None:
        """One line for the person who watches. Called on the leading rank only."""
        ...


class LocalHost:
    """Listens to SIGTERM and Ctrl-C as a context manager; prints to the terminal.

    The first signal asks for a clean end after the step and a save; a second one ends the process at once.
    Signal handlers can only be set in the main thread; elsewhere it just never is preempted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal; SIGTERM for a notice."""
        self._signalled = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "LocalHost":
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals (again): libraries that start later, such as Ray, put their own handlers in place."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before.setdefault(number, signal.signal(number, self._receive))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def notice(self, words: str) -> None:
        """The machine will be taken away: as if SIGTERM had come."""
        print(f"stopping: this machine will be taken away ({words})", file=sys.stderr, flush=True)
        self.received = self.received or signal.SIGTERM

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os.write(2, b"second signal: stopping at once; the last checkpoint stays\n")
            os._exit(exit_code(number))
        self.received, self._signalled = number, True
        os.write(2, b"stopping: the step is finished and saved first; a second signal stops at once\n")

    def place(self) -> str:
        return socket.gethostname()

    def alive(self, step: int, doing: Doing) -> None:
        """Nobody watches."""

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        """Nobody watches."""

    def preempted(self) -> bool:
        return self.received is not None

    def saved(self, step: int) -> None:
        """Nobody else needs to know."""

    def say(self, line: str) -> None:
        print(line, file=sys.stdout, flush=True)


def exit_code(received: int | None) -> int:
    """The process's exit code after a clean end caused by signal `received` (None: it ran to its end)."""
    if received is None:
        return COMPLETE
    return INTERRUPTED if received == signal.SIGINT else STOPPED
