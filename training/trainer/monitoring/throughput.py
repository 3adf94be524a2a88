"""Images per second, who waits for whom, and when the run will end."""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from datapipe.stream.batch import LoaderCounters
from training.core.devices import slow_precision
from training.core.exchange import Exchange, Table
from training.core.precision import Precision

WARM_UP = 2
"""Steps after a start, a restore or a score that say nothing of the time left: compilation, caches, the first data."""
STEADY = 3
"""Steps that must be known before the time left is told."""
STRAY = 20.0
"""Times the usual step from which a step was no training: the process was stopped, the machine slept."""
UNNOTICED = 0.05
"""Share of the time spent waiting for data below which data is not what limits a run."""

REMEMBERED = 20
"""Last pauses of a kind whose mean is what the next ones will take."""

Bottleneck = Literal["training", "reading", "views"]


Pause = Literal["saves", "scores", "labels"]
"""What the loop stands still for again and again: checkpoints, scores at milestones, pseudo labels of an epoch."""


class TimeSpent(NamedTuple):
    """What one rank's steps took so far, in all."""

    waited_s: float
    """Seconds it stood still for data."""
    intake: LoaderCounters


class SpentByRank:
    """What the steps of every rank took so far, in all; as arrays, so that hundreds of ranks cost what one does."""

    def __init__(self, table: Table) -> None:
        """[ranks, 1 + fields of LoaderCounters]: a row is `waited_s`, then the counters."""
        self._table = table

    @staticmethod
    def of(ranks: Sequence[TimeSpent]) -> "SpentByRank":
        """Rank by rank."""
        rows = [[rank.waited_s, *rank.intake] for rank in ranks]
        return SpentByRank(np.array(rows, dtype=np.float64).reshape(-1, COLUMNS))

    @property
    def ranks(self) -> list[TimeSpent]:
        """Rank by rank."""
        return [TimeSpent(waited, LoaderCounters(*rest)) for waited, *rest in self._table.tolist()]

    @property
    def longest_wait_s(self) -> float:
        """Seconds of the rank that stood still for data the longest; 0 where no rank has told yet."""
        return float(self._table[:, 0].max(initial=0.0))

    @property
    def intake(self) -> LoaderCounters:
        """Counters of all ranks together; `renewed` is of the rank that has gone over to newer data most often."""
        sums, renewed = self._table[:, 1:].sum(axis=0), self._table[:, _RENEWED].max(initial=0.0)
        return LoaderCounters(*sums.tolist())._replace(renewed=int(renewed))

    def since(self, before: "SpentByRank") -> "SpentByRank":
        """What was added to that. One of no ranks is that of the beginning."""
        return SpentByRank(self._table - before._table) if len(before) else self

    def __len__(self) -> int:
        return len(self._table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpentByRank) and np.array_equal(self._table, other._table)


COLUMNS = 1 + len(LoaderCounters._fields)
_RENEWED = 1 + LoaderCounters._fields.index("renewed")
NOBODY = SpentByRank(np.empty((0, COLUMNS)))
"""Nobody has told yet."""


class RankCounters:
    """What every rank spent so far; of other ranks as it was a step before, so that nobody waits for them."""

    def __init__(self, exchange: Exchange) -> None:
        self._alone = exchange.alone
        self._waited_s, self._intake = 0.0, LoaderCounters()
        self.latest = NOBODY
        """Of nobody in the first step of several ranks."""
        exchange.add_rows(self._contribute, self._apply)

    def note(self, waited_s: float, intake: LoaderCounters) -> None:
        """Once per step on every rank, `waited_s` in this step."""
        self._waited_s, self._intake = self._waited_s + waited_s, intake
        if self._alone:
            self.latest = SpentByRank.of([TimeSpent(self._waited_s, intake)])

    def _contribute(self) -> list[float] | None:
        return None if self._alone else [self._waited_s, *self._intake]

    def _apply(self, rows: Table) -> None:
        self.latest = SpentByRank(rows)


class Rates(NamedTuple):
    """Rates over the most recent steps, of all ranks together."""

    images_per_s: float
    wait_share: float
    """Share of the time that the rank which waits most for data stood still: the others wait for it."""
    reading_share: float
    """Part of the loader threads' working time that went into reading bytes, rather than into making views."""
    fetched_mb_per_s: float
    """Megabytes (10^6 bytes) asked of the storage."""
    cache_hits: float | None
    """Share of the crops that came from a cache; None where there is none."""

    @property
    def bottleneck(self) -> Bottleneck:
        """What would have to be faster for the run to be faster."""
        return bottleneck(self.wait_share, self.reading_share)


def bottleneck(wait_share: float, reading_share: float) -> Bottleneck:
    """As in `Rates`. "training": the steps themselves; on a CPU also whatever else wants its cores."""
    if wait_share < UNNOTICED:
        return "training"
    return "reading" if reading_share > 0.5 else "views"


def in_words(rates: Rates) -> str:
    """`812 img/s  wait 12 % reading`: what is waited for where the wait matters."""
    wait = f"wait {100 * rates.wait_share:.0f} %"
    return f"{rates.images_per_s:,.0f} img/s  {wait}" + (
        "" if rates.bottleneck == "training" else f" {rates.bottleneck}"
    )


class Speed:
    """Rates over the most recent steps."""

    def __init__(self, window: int = 50) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._spent: deque[SpentByRank] = deque(maxlen=window + 1)
        self._steady: deque[tuple[float, int]] = deque(maxlen=window)
        self._pauses: dict[Pause, deque[float]] = {}
        self._warming = WARM_UP
        self._last = time.perf_counter()

    def step(self, images: int, spent: SpentByRank) -> Rates:
        """Note one step of the whole run; `spent`: what `RankCounters` gave."""
        now = time.perf_counter()
        self._steps.append((now - self._last, images))
        if self._warming:
            self._warming -= 1
        else:
            self._steady.append(self._steps[-1])
        self._last = now
        if len(spent):
            if not self._spent:
                self._spent.append(NOBODY)
            self._spent.append(spent)
        seconds = sum(step[0] for step in self._steps)
        lately = self._spent[-1].since(self._spent[0]) if self._spent else NOBODY
        waited, intake = lately.longest_wait_s, lately.intake
        worked = intake.reading_s + intake.making_s
        return Rates(
            images_per_s=sum(step[1] for step in self._steps) / seconds,
            wait_share=waited / seconds,
            reading_share=intake.reading_s / worked if worked else 0.0,
            fetched_mb_per_s=intake.fetched / seconds / 1e6,
            cache_hits=intake.cached / intake.sought if intake.sought else None,
        )

    def pause(self, kind: Pause | None = None) -> None:
        """Forget the time since the last step or pause: a save or a rehearsal is not training speed. `kind`: what the
        loop stood still for, where that comes again."""
        now = time.perf_counter()
        if kind is not None:
            self._pauses.setdefault(kind, deque(maxlen=REMEMBERED)).append(now - self._last)
        self._last = now

    def begin_anew(self) -> None:
        """After scores, or from an earlier checkpoint: the next steps are first ones again."""
        self.pause()
        self._warming = WARM_UP

    def training_s(self, images_left: int) -> float:
        """Seconds that so many images take at the present rate; not a number until that is known."""
        if not images_left:
            return 0.0
        if len(self._steady) < STEADY:
            return float("nan")
        usual = statistics.median(step[0] for step in self._steady)
        counted = [step for step in self._steady if step[0] <= STRAY * usual]
        return images_left * sum(step[0] for step in counted) / sum(step[1] for step in counted)

    def pauses_s(self, left: Mapping[Pause, float]) -> float:
        """Seconds that so many pauses of each kind take, each as long as the last ones; a kind that was not seen yet is
        not counted."""
        seen = {kind: statistics.fmean(self._pauses[kind]) for kind in left if kind in self._pauses}
        return sum(left[kind] * seconds for kind, seconds in seen.items())


def faster_precision(device: torch.device, seconds: float = 0.3) -> Precision:
    """The precision that is fastest here. Of CPUs, which differ, fp32 or bf16, measured; of GPUs bf16 where they
    have units for it, else fp16."""
    if device.type == "cuda":
        return "fp16" if slow_precision("bf16", device) else "bf16"
    inputs, layer = torch.randn(2_048, 192), torch.nn.Linear(192, 768)
    counts: dict[Precision, int] = {}
    names: tuple[Precision, ...] = ("fp32", "bf16")
    for name in names:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16"):
            layer(inputs)
            end, count = time.perf_counter() + seconds, 0
            while time.perf_counter() < end:
                layer(inputs)
                count += 1
        counts[name] = count
    return "bf16" if counts["bf16"] > counts["fp32"] else "fp32"
