"""How much time each rank needs by itself, and which one keeps the others waiting: ranks/pace.jsonl, and a line.

A step takes as long on every rank, as all wait for the slowest; so what counts is the time before they meet: waiting
for data, and the forward pass. With ZeRO-3 ranks meet in the forward pass already: there only the data is seen.
"""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from training.core.exchange import Exchange, Table
from training.core.host import Doing, Host, run_lines
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.methods.base import Method
from training.trainer.monitoring.observer import Observer, StepDone

log = logging.getLogger(__name__)

WINDOW_STEPS = 20
"""Steps that are averaged. Ranks exchange their times once in so many."""
SLOWER = 1.5
"""Own time over the middle of the others' from which a rank counts as a straggler."""
SHARE = 0.1
"""Part of a step that the difference must be, at least."""


class RankTimes(NamedTuple):
    """A rank's seconds per step."""

    forward_s: float
    waited_s: float
    """For data."""
    step_s: float

    @property
    def own_s(self) -> float:
        """Before the ranks meet."""
        return self.forward_s + self.waited_s


def stragglers(shares: Sequence[RankTimes] | Table) -> set[int]:
    """The ranks that keep the others waiting. `shares`: [ranks, fields of RankTimes]."""
    table = np.asarray(shares, dtype=np.float64)
    own, step = _own(table), table[:, RankTimes._fields.index("step_s")]
    usual = _usual_of_others(own)
    return set(np.flatnonzero((own > SLOWER * usual) & (own - usual > SHARE * step)).tolist())


def _own(shares: Table) -> Table:
    """Each rank's `RankTimes.own_s`."""
    return shares[:, 0] + shares[:, 1]


def _usual_of_others(own: Table) -> Table:
    """For each rank the median of the others' times, [ranks]; of one rank its own."""
    if len(own) == 1:
        return own
    order = np.argsort(own, kind="stable")
    place = np.argsort(order, kind="stable")  # of each rank among the sorted
    times, others = own[order], len(own) - 1
    low, high = (others - 1) // 2, others // 2  # the middle of the others, where it is between two: both
    return (times[low + (place <= low)] + times[high + (place <= high)]) / 2


class StragglerMonitor(Observer):
    """Measures this rank, compares all. On every rank."""

    def __init__(self, method: Method, host: Host, world: World, folder: RunFolder, exchange: Exchange) -> None:
        self._host, self._world, self._folder = host, world, folder
        self._places = world.all_gather(host.place())
        self._steps = 0
        self._slow: set[int] = set()
        self._suspected: set[int] = set()
        self._alone = exchange.alone
        self._full = False
        """Is a window over, and not told yet?"""
        self._timer = _Timer(world.device)
        self.begin()
        exchange.add_rows(self._contribute, self._apply)
        method.register_forward_pre_hook(self._enter)
        method.register_forward_hook(self._leave)

    def begin(self) -> None:
        """A window begins; what was before is forgotten."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        self._done = getattr(self, "_done", 0)
        self._timer.reset()

    def step(self, step: StepDone) -> None:
        self._steps, self._done = self._steps + 1, step.done
        self._waited_s += step.batch.waited_s
        self._host.alive(step.done, "data")
        self._full = self._steps % WINDOW_STEPS == 0

    def mine(self) -> RankTimes:
        """This rank's own share in the window so far."""
        steps = max(1, (self._steps - 1) % WINDOW_STEPS + 1)
        return RankTimes(
            self._timer.total_s() / steps, self._waited_s / steps, (time.perf_counter() - self._began) / steps
        )

    def _enter(self, *_: Any) -> None:
        self._reached("forward", self._timer.start())

    def _leave(self, *_: Any) -> None:
        self._reached("backward", self._timer.stop())

    def _reached(self, doing: Doing, event: torch.cuda.Event | None) -> None:
        if event is None:
            self._host.alive(self._done, doing)
        else:
            self._host.launched(self._done, doing, event.query)

    def _contribute(self) -> RankTimes | None:
        """Once in a window, for the exchange."""
        if not self._full:
            return None
        mine, self._full = self.mine(), False
        self.begin()
        log.info("step %d: %.3f s a step, of them %.3f s forward, %.3f s waiting for data", self._done,
                 mine.step_s, mine.forward_s, mine.waited_s)  # fmt: skip
        return None if self._alone else mine

    def _apply(self, rows: Table) -> None:
        """The shares of all ranks: seconds per step by itself, and the part of the step that each waited for data. The
        leading rank tells for all."""
        if not self._world.is_leader:
            return
        waits = rows[:, RankTimes._fields.index("waited_s")] / rows[:, RankTimes._fields.index("step_s")]
        line = {"step": self._done, "own_s": _own(rows).tolist(), "wait_share": waits.tolist()}
        self._folder.append("ranks/pace.jsonl", json.dumps(line))
        self._judge(rows)

    def _judge(self, shares: Table) -> None:
        """Tell who has begun or ceased to lag, in two windows in a row: one slow moment is none."""
        straggling = stragglers(shares)
        certain = straggling & (self._suspected | self._slow)
        if certain - self._slow:
            usual = _usual_of_others(_own(shares)).tolist()
        for rank in sorted(certain - self._slow):
            own = RankTimes(*shares[rank].tolist())
            run_lines.info(f"straggler: rank {rank} on {self._places[rank]} needs {own.own_s:.3f} s a step by itself "
                      f"({own.forward_s:.3f} s forward, {own.waited_s:.3f} s waiting for data), "
                      f"the others {usual[rank]:.3f} s")  # fmt: skip
        for rank in sorted(self._slow - straggling):
            run_lines.info(f"rank {rank} on {self._places[rank]} keeps up again")
        self._slow, self._suspected = certain, straggling


class _Timer:
    """Sums stretches of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self._sum_s, self._began = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> torch.cuda.Event | None:
        """On a GPU the event that happens when it begins with what comes now."""
        self._began = time.perf_counter()
        if not self._cuda:
            return None
        self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._events[-1][0].record()
        return self._events[-1][0]

    def stop(self) -> torch.cuda.Event | None:
        """On a GPU the event that happens when it is done with what came since `start`."""
        if not self._cuda:
            self._sum_s += time.perf_counter() - self._began
            return None
        self._events[-1][1].record()
        return self._events[-1][1]

    def total_s(self) -> float:
        """Waits for the device, so ask seldom."""
        if not self._cuda or not self._events:
            return self._sum_s
        self._events[-1][1].synchronize()
        return sum(first.elapsed_time(last) for first, last in self._events) / 1_000
