"""How far a long command is: a bar on a terminal, one plain line per interval in a log; as a rule on stderr. And how
much a process has done so far, for whoever judges whether it stands still."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from datapipe.core.process_setup import control_characters_shown, shown

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")
INTERVAL_S = 10.0
"""Seconds between two lines in a log."""
FIRST_S = 2.0
"""Seconds after which the first one comes."""
QUIET_S = 5.0
"""Seconds that work which is short as a rule may take without leaving a line about it."""
SETTLED = 3
"""Advances from which on the time left is told: the first ones take what starting takes."""

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def lines_sent_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Lines go to `listener`, of work in this thread; no bar."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """`with Progress("scan", total_bytes) as progress: progress.advance(n, "312 crops, 1 quarantined", crops=312)`."""

    _shown = False
    """Is there a bar on the terminal? There can be one; work within that work has none."""

    def __init__(self, label: str, total: float, *, unit: str = "", quiet_s: float = 0.0) -> None:
        """`unit`: what is counted ("images"); numbers and rates are shown then. What is over before `quiet_s` seconds
        leaves no line."""
        self.label, self.total, self.done, self.crops, self.note = label, max(total, 1e-9), 0.0, 0, ""
        self.unit, self.quiet_s = unit, quiet_s
        self.began = time.monotonic()
        self.printed_at = self.began + FIRST_S - INTERVAL_S
        self._advances = 0
        self._first = (self.began, 0.0)
        self._printed = False
        self._prints = not Progress._shown or _listener.get() is not None
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and _listener.get() is None and not Progress._shown:
            self._bar = _new_bar(transient=self.quiet_s > 0)
        if self._bar:
            self._bar.start()
            Progress._shown = True
            self._guard = control_characters_shown()  # rich has put streams of its own in place of ours
            self._guard.__enter__()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def advance(self, amount: float, note: str = "", *, crops: int = 0) -> None:
        """`amount` more of the total, and so many more crops, are done; `note` replaces the one before.

        With crops, the amount is taken for bytes and rates are shown.
        """
        self.done, self.crops, self._advances = self.done + amount, self.crops + crops, self._advances + 1
        if self._advances == 1:
            self._first = (time.monotonic(), self.done)
        self.note = ", ".join(filter(None, [note, self._rate()]))
        if self._bar:
            note = f"{shown(self.note)}, {duration(self.left_s())} left".replace("[", r"\[")
            self._bar.update(self._task, advance=amount, note=note)
        elif self._prints and time.monotonic() - self.printed_at >= INTERVAL_S:
            self._speak(f"{duration(self.left_s())} left")

    def over(self, parts: Iterable[T], size: Callable[[T], float]) -> Iterator[T]:
        """Yield the parts unchanged; each counts as done, `size(part)` of the total, when the next one is asked for."""
        for part in parts:
            amount = size(part)  # the part may be overwritten meanwhile
            yield part
            self.advance(amount)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._guard.__exit__(None, None, None)
            self._bar.stop()
            Progress._shown = False
        elif kind is None and self._prints and (self._printed or self._passed_s() >= self.quiet_s):
            self._speak(f"{self._passed_s():.1f} s")

    def left_s(self) -> float:
        """Seconds until all is done, by the rate since the first advance; not a number before it can be known."""
        began, done = self._first
        if self.done >= self.total:
            return 0.0
        if self._advances < SETTLED or self.done <= done:
            return math.nan
        return (time.monotonic() - began) * (self.total - self.done) / (self.done - done)

    def _rate(self) -> str:
        passed = max(self._passed_s(), 1e-9)
        if self.unit:
            return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}, {self.done / passed:,.0f} {self.unit}/s"
        return f"{self.crops / passed:,.0f} crops/s, {self.done / passed / 1e6:,.1f} MB/s" if self.crops else ""

    def _passed_s(self) -> float:
        return time.monotonic() - self.began

    def _speak(self, time_note: str) -> None:
        self.printed_at, self._printed = time.monotonic(), True
        share = min(1.0, self.done / self.total)
        line = ", ".join(filter(None, [f"{self.label}: {share:4.0%}", self.note, time_note]))
        listener = _listener.get()
        if listener is None:
            print(line, file=sys.stderr, flush=True)
        else:
            listener(line)


def _new_bar(*, transient: bool) -> "Bar | None":
    """A bar on stderr; None where rich is not installed, as the loop alone does not need it: lines then."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
    )
    return Bar(*columns, console=Console(stderr=True), transient=transient)


def counted(number: int, noun: str) -> str:
    """`1 crop`, `2,000 crops`. `noun`: in the singular, with a plural in -s or, after s, in -es."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """`85 s`, `12 min`, `14 h 20`, `3 d 4 h`; `?` where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7_200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d}"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


class WorkDone(NamedTuple):
    """What a process has done since it began, in amounts that only grow."""

    modules: int
    """Imported."""
    read: int
    """Bytes that stores have brought, and one for each of their other answers."""

    def __str__(self) -> str:
        return f"{self.modules:,} modules imported, {self.read / 1e6:,.1f} MB read"


_reading = threading.Lock()
_read = 0


def has_read(size: int) -> None:
    """Count bytes that a store has brought. From any thread."""
    global _read
    with _reading:
        _read += size


def work_done() -> WorkDone:
    """How much this process has done so far."""
    return WorkDone(len(sys.modules), _read)
