"""Rates per CPU-second of the whole process tree, from rounds in which the contenders take turns.

Wall time says little on a machine that others use too; CPU time moves by some per cent there, and the ratio of two
contenders that ran one after the other by less. So: medians, their spread, and ratios formed within each round.
"""

import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from time import process_time

import psutil

Work = Callable[[], int]
"""Does the work of one round; returns how many images (or queries, or batches) that was."""
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


def rates(works: Mapping[str, Work], rounds: int) -> Rates:
    """Every contender once per round, after one round that is not counted; every other round in reverse."""
    found: Rates = {name: [] for name in works}
    for number in range(rounds + 1):
        turn = list(works.items())
        for name, work in turn if number % 2 == 0 else reversed(turn):
            before = cpu_s()
            done = work()
            if number:
                found[name].append(done / max(cpu_s() - before, 1e-9))
    return found


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def cpu_s() -> float:
    """User and system time of this process, all its threads, and its descendants, living or waited for."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = process_time() + gone.ru_utime + gone.ru_stime
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:4])  # its own user and system time, and that of its own dead children
    return total
