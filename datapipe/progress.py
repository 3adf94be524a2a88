"""How far a long command is: a bar on a terminal, one plain line per interval in a log; always on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

INTERVAL_S = 10.0
"""Seconds between two lines in a log."""


class Progress:
    """`with Progress("scan", total_bytes) as progress: progress.advance(n, "312 crops, 1 quarantined", crops=312)`."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total, self.done, self.crops, self.note = label, max(total, 1e-9), 0.0, 0, ""
        self.began = self.spoken = time.monotonic()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def advance(self, amount: float, note: str, *, crops: int = 0) -> None:
        """`amount` more of the total, and so many more crops, are done; `note` replaces the one before.

        With crops, the amount is taken for bytes and rates are shown.
        """
        self.done, self.crops = self.done + amount, self.crops + crops
        self.note = note + self._rate()
        if self._bar:
            self._bar.update(self._task, advance=amount, note=self.note)
        elif time.monotonic() - self.spoken >= INTERVAL_S:
            self._speak(f", {duration(self._left_s())} left")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._speak(f", {self._passed_s():.1f} s")

    def _rate(self) -> str:
        passed = max(self._passed_s(), 1e-9)
        return f", {self.crops / passed:,.0f} crops/s, {self.done / passed / 1e6:,.1f} MB/s" if self.crops else ""

    def _passed_s(self) -> float:
        return time.monotonic() - self.began

    def _left_s(self) -> float:
        return self._passed_s() * (self.total / self.done - 1) if self.done else float("inf")

    def _speak(self, time_note: str) -> None:
        self.spoken = time.monotonic()
        share = min(1.0, self.done / self.total)
        print(f"{self.label}: {share:4.0%}, {self.note}{time_note}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """"48 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
