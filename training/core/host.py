"""What a run asks of the place it runs in, and tells it. Ray's host lives in `cluster/`."""

import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from datapipe.core import stop_signals
from datapipe.core.stop_signals import exit_code
from training.core.step_phase import Doing

__all__ = ["Doing", "Host", "LocalHost", "exit_code", "lines_to", "run_lines"]

run_lines = logging.getLogger("training.run")
"""What a run has to tell the person who watches. Heard where a handler is: on the leading rank, the host's, and once
steps begin that of log.txt. A warning begins with that word."""
run_lines.propagate = False  # a rank's own log is another thing
run_lines.setLevel(logging.INFO)
run_lines.addHandler(logging.NullHandler())


class Host(Protocol):
    """The scheduler's side of a run."""

    def place(self) -> str:
        """The machine that this rank is on, in a person's terms."""
        ...

    def alive(self, step: int, doing: Doing) -> None:
        """This rank has come so far: `step` steps are done. Cheap; called a few times in each step."""
        ...

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        """This rank will have come so far when its GPU has: once `reached`, asked from any thread, is true."""
        ...

    def stepping(self) -> None:
        """The first step of this attempt is about to begin: from now on there is something to save. Cheap; called
        before every step."""
        ...

    def preempted(self) -> bool:
        """True when this process was told to save and end. Cheap; asked at every step, may differ between ranks."""
        ...

    def saved(self, step: int) -> None:
        """A checkpoint of `step` exists. Called on every rank, equally often."""
        ...

    def show_line(self, line: str) -> None:
        """One line for the person who watches. Called on the leading rank only."""
        ...


class _Line(logging.Formatter):
    """The message, after "warning: " where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()


class _Shown(logging.Handler):
    """Hands lines on. What goes wrong meanwhile is raised where the line is logged."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take
        self.setFormatter(_Line())

    def emit(self, record: logging.LogRecord) -> None:
        self._take(self.format(record))


@contextlib.contextmanager
def lines_to(take: Callable[[str], None]) -> Iterator[None]:
    """The run's lines are handed to `take`, for as long as the context lasts."""
    handler = _Shown(take)
    run_lines.addHandler(handler)
    try:
        yield
    finally:
        run_lines.removeHandler(handler)


class LocalHost:
    """Listens to Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP as a context manager; prints to the terminal.

    The first signal asks for a clean end after the step and a save; a second one ends the process at once. `starting`:
    until the first step there is nothing to save, and the first signal ends the process at once.
    Signals can only be taken in the main thread; elsewhere it just never is preempted.
    """

    def __init__(self, *, starting: bool = False) -> None:
        self.received: int | None = None
        """The first signal; SIGTERM for a notice."""
        self.starting = starting
        """Is there nothing to save yet?"""
        self._signalled = False
        self._taken = contextlib.ExitStack()

    def __enter__(self) -> "LocalHost":
        self._taken.enter_context(stop_signals.receiving(self._receive))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._taken.close()

    def notice(self, words: str) -> None:
        """The machine will be taken away: as if SIGTERM had come."""
        print(f"stopping: this machine will be taken away ({words})", file=sys.stderr, flush=True)
        self.received = self.received or signal.SIGTERM

    def _receive(self, number: int) -> None:
        listener = stop_signals.current()
        assert listener is not None  # it calls this
        if self._signalled:
            listener.words = " a second time: stopping at once; the last checkpoint stays"
            listener.end(number)
        if self.starting:
            listener.words = " before the first step: nothing needed saving"
            listener.end(number)
        self.received, self._signalled = number, True
        stop_signals.write_line(f"{stop_signals.name_of(number)}: stopping; the step is finished and saved first; "
                            "a second signal stops at once")  # fmt: skip

    def place(self) -> str:
        return socket.gethostname()

    def alive(self, step: int, doing: Doing) -> None:
        """Nobody watches."""

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        """Nobody watches."""

    def stepping(self) -> None:
        self.starting = False

    def preempted(self) -> bool:
        return self.received is not None

    def saved(self, step: int) -> None:
        """Nobody else needs to know."""

    def show_line(self, line: str) -> None:
        try:
            print(line, file=sys.stdout, flush=True)
        except OSError as error:
            if self.received is None and error.errno != errno.EIO:  # a terminal that hangs up sends SIGHUP, too
                raise
            stop_signals.silence(1)  # whoever read it was stopped as well: the save matters more
