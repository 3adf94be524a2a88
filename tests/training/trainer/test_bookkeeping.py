"""What the loop does beside training steps does not grow with the ranks: counted in a simulated world, not timed."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from datapipe.core.config import StorageConfig
from datapipe.stream.batch import LoaderCounters
from tests.bench.training_thread import Collectives, Rank, recorded, world_of
from training.core.run_folder.run_folder import RunFolder
from training.trainer.monitoring import heartbeat
from training.trainer.monitoring.stragglers import SHARE, SLOWER, WINDOW_STEPS, RankTimes, stragglers

FEW, MANY = 8, 512
EXTRA = 1.05
"""Times as much work with many ranks as with few."""


def instructions(work: Callable[[], object]) -> int:
    """Bytecode instructions that this thread carries out: loops count, whatever they are written as."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def window(ranks: int, folder: Path, *, leader: bool) -> tuple[int, int, int, list[float]]:
    """(instructions of the steps of a window, all-reduces, numbers in them, what the last record says of waiting)."""
    with Collectives().installed() as collectives:
        run = RunFolder(str(folder), StorageConfig())
        recorded(ranks, run, collectives)
        collectives.recording = False
        rank = Rank(world_of(ranks, 0 if leader else 1), run, records=True)
        for observer in rank.observers:
            observer.begin()

        def steps() -> None:
            for _ in range(WINDOW_STEPS):
                for part in rank.parts.values():
                    part()

        steps()  # what is done once
        collectives.count = collectives.numbers = 0
        done = instructions(steps)
        waits = [one.waited_s for one in rank.tally.latest.ranks]
        for observer in rank.observers:
            observer.close()
    return done, collectives.count, collectives.numbers, waits


@pytest.mark.parametrize("leader", [True, False], ids=["leading rank", "another"])
def test_bookkeeping__of_a_step_does_not_grow_with_the_ranks(
    tmp_path: Path, leader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 1e9)  # once in so many seconds, not steps
    few, _, _, _ = window(FEW, tmp_path / "few", leader=leader)
    many, reduces, numbers, waits = window(MANY, tmp_path / "many", leader=leader)
    assert many < EXTRA * few
    assert reduces == WINDOW_STEPS, "one all-reduce a step"
    columns = 1 + len(LoaderCounters._fields)
    assert numbers <= WINDOW_STEPS * (MANY * columns + 20) + MANY * len(RankTimes._fields)
    assert len(waits) == MANY and min(waits) > 0, "every rank was heard"


def test_stragglers__of_many_ranks_are_those_of_a_loop_over_them() -> None:
    """Against the definition, by the standard library's median, for even and odd numbers of ranks, with ties."""
    from statistics import median

    random = np.random.default_rng(0)
    for ranks in (1, 2, 3, 4, 9, 64, 101):
        for spread in (0.05, 0.5, 2.0):
            shares = [RankTimes(*row) for row in np.round(np.exp(spread * random.normal(size=(ranks, 3))), 1).tolist()]
            slow = set()
            for rank, share in enumerate(shares):
                others = [other.own_s for place, other in enumerate(shares) if place != rank]
                usual = median(others) if others else share.own_s
                if share.own_s > SLOWER * usual and share.own_s - usual > SHARE * share.step_s:
                    slow.add(rank)
            assert stragglers(shares) == slow
