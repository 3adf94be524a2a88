"""The simulation of reading: figures that are known without it."""

from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import StreamConfig
from tests.bench.reading import Asked, MadeUp, Simulation, epochs, simulated

MADE = MadeUp(6_000, 9e3)
BATCH, BLOCKS = 60, 6_000 // 20
WINDOW = 50 * 20 * MADE.crop_bytes / 0.95 / 1e9
"""GB that `stream.cache_gb` needs for one."""


def config(windows: float) -> StreamConfig:
    return StreamConfig(block=20, window=50, threads=1, prefetch=1, cache_mb=0, cache_gb=windows * WINDOW)


def asked(folder: Path, windows: float) -> Asked:
    """In the second and third window of an epoch of six, on one machine."""
    with simulated(MADE):
        run = Simulation(MADE, config(windows), BATCH, folder)
        run.start(1)
        return run.run([range(960), range(960, 2_940)])[1]


@pytest.mark.slow
def test_simulation__with_room_each_block_is_asked_for_once_and_ahead(tmp_path: Path) -> None:
    first, second, _ = epochs(MADE, config(20), BATCH, 1)
    assert (first.requests, first.waited_for, first.images) == (BLOCKS, 0, 6_000)
    assert (second.requests, second.bytes) == (0, 0)
    full = asked(tmp_path, 2.3)
    assert full.waited_for == 0 and full.requests == pytest.approx(full.images / 20, rel=0.1)
    assert full.bytes / full.images / MADE.crop_bytes == pytest.approx(1.08, abs=0.05)  # headers


@pytest.mark.slow
def test_simulation__less_room_costs_more_without_a_cliff(tmp_path: Path) -> None:
    found = [asked(tmp_path / str(windows), windows) for windows in (2.3, 1.6, 1.2, 1.0, 0.8, 0.6)]
    waited = np.array([one.waited_for / one.images for one in found])
    assert (np.diff(waited) > 0).all()
    assert waited[3] <= 0.15, "of blocks of 20 nothing is ahead, and each is asked for about once"
    assert waited[5] == pytest.approx(0.4, abs=0.15), "four of ten crops are read singly"


def test_simulation__some_machines_stand_for_all() -> None:
    every, some = (epochs(MADE, config(20), 96, 6, at_most)[0] for at_most in (6, 3))  # two images a rank
    assert every.images == 2 * some.images == 6_000 // 96 * 96
    assert some.per_image(9e3)[0] == pytest.approx(every.per_image(9e3)[0], rel=0.1)


def test_simulation__a_lost_machine_costs_less_than_a_window(tmp_path: Path) -> None:
    _, second, lost = epochs(MADE, config(20), BATCH, 3)
    assert second.waited_for == 0
    assert 0 < lost.requests < BLOCKS and lost.images == 50 * 20 // BATCH * BATCH
