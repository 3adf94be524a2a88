"""Rates per CPU-second of the whole process tree, from rounds in which the contenders take turns.

Wall time says little on a machine that others use too; CPU time moves by some per cent there, and the ratio of two
contenders that ran one after the other by less. So: medians, their spread, and ratios formed within each round.
"""

import re
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import psutil

Work = Callable[[], int]
"""Does the work of one round; returns how many images (or queries, or batches) that was."""
Clock = Callable[[], float]
"""CPU seconds used so far."""
Rates = dict[str, list[float]]
"""Contender -> work per CPU-second, a figure per round."""


@dataclass(frozen=True)
class Spread:
    """The figures of several rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(figures: list[float]) -> "Spread":
        return Spread(median(figures), min(figures), max(figures))


def rates(works: Mapping[str, Work], rounds: int, clocks: Mapping[str, Clock] | None = None) -> Rates:
    """Every contender once per round, after one round that is not counted; every other round in reverse.

    `clocks` by contender: for those that work in processes which live on beside the others; default `cpu_s`.
    """
    found: Rates = {name: [] for name in works}
    for number in range(rounds + 1):
        turn = list(works.items())
        for name, work in turn if number % 2 == 0 else reversed(turn):
            clock = (clocks or {}).get(name, cpu_s)
            before = clock()
            done = work()
            if number:
                found[name].append(done / max(clock() - before, 1e-9))
    return found


def repeated(work: Work, times: int) -> Work:
    """The same work so many times in one round: in half a second figures swing by a tenth either way."""
    return lambda: sum(work() for _ in range(times))


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def cpu_s() -> float:
    """User and system time of this process, all its threads, and its descendants, living or waited for."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + gone.ru_utime + gone.ru_stime + _used(psutil.Process().children(recursive=True))


def tree_cpu_s(root: int) -> float:
    """User and system time of another process and its descendants, living or waited for."""
    process = psutil.Process(root)
    return _used([process, *process.children(recursive=True)])


def peak_mb() -> float:
    """The most that this process has held since it began (`ru_maxrss` would count what its parent held)."""
    return _status_mb("VmHWM")


def held_mb() -> float:
    """What this process holds in memory now."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def _used(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # its own user and system time, and that of its own dead children
    return total
