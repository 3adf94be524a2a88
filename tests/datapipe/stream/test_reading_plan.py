"""How much of a window is kept and read ahead: it shrinks with the room there is, and what to set is said."""

import re
from typing import Literal

import numpy as np
import pytest

from datapipe.core.config import StreamConfig
from datapipe.sampling.epoch_order import Order
from datapipe.stream.reading_plan import ReadingPlan, among, needed_gb, numbers_of, plan_reading
from tests.bench.reading import assignment_of

ROWS = 4_180_243


def planned(
    crop_kb: float, *, machines: int = 1, rows: int = ROWS, remote: bool = True, **settings: float
) -> ReadingPlan:
    config = StreamConfig(**settings)  # type: ignore[arg-type]
    return plan_reading(config, rows=rows, crop_bytes=crop_kb * 1e3, remote=remote, machines=machines)


def test_plan__no_cliff_as_crops_grow() -> None:
    """From crop size to crop size little changes, where read-ahead and blocks were switched off before."""
    plans = [planned(kb) for kb in np.arange(4.0, 200.0, 0.25)]
    for field, at_most in (("kept", 0.03), ("ahead", 0.06)):
        values = np.array([getattr(plan, field) for plan in plans])
        assert values[0] == 1 and (np.diff(values) <= 0).all() and -np.diff(values).min() < at_most
    assert all(plan.kept == 1 or plan.ahead == 0 for plan in plans)
    assert plans[-1].kept > 0.1


@pytest.mark.parametrize("crop_kb", [11.5, 16.0, 23.0, 40.0, 200.0])
@pytest.mark.parametrize("machines", [1, 3])
def test_advice__says_what_to_set_and_that_is_enough(crop_kb: float, machines: int) -> None:
    plan = planned(crop_kb, machines=machines)
    told = " ".join(plan.advice())
    if plan.ahead == 1:
        assert machines > 1 and not told
        return
    wanted = float(re.search(r"stream\.cache_gb = ([\d.]+) keeps two windows", told)[1])  # type: ignore[index]
    better = planned(crop_kb, machines=machines, cache_gb=wanted)
    assert better.ahead == 1 and not list(better.advice())
    assert planned(crop_kb, machines=machines, cache_gb=wanted - 0.2).ahead < 1


def test_plan__machines_share_a_window() -> None:
    """With room for more than the mean: some samples are moved from their home."""
    plans = [planned(30.0, machines=machines) for machines in (1, 2, 8, 64)]
    windows = [plan.window for plan in plans]
    assert windows == sorted(windows, reverse=True) and plans[0].kept < 1 and plans[-1].ahead == 1
    assert windows[0] / 64 < windows[-1] < windows[0] / 4


def test_plan__memory_disk_or_nothing() -> None:
    assert planned(1.0, rows=100_000).keeps == "memory"
    assert planned(1.0, rows=100_000, remote=False).keeps == "memory"
    assert planned(9.0).keeps == "disk"
    local = planned(9.0, remote=False)
    assert local.keeps == "nothing" and not list(local.advice()), "a local disk is read crop by crop"
    none = planned(9.0, cache_gb=0)
    assert none.keeps == "nothing" and "one by one" in next(none.advice())


def test_plan__data_sets_of_a_mix_share_the_disk() -> None:
    config = StreamConfig()
    alone = plan_reading(config, rows=ROWS, crop_bytes=8e3, remote=True)
    mixed = plan_reading(config, rows=ROWS, crop_bytes=8e3, remote=True, beside=alone.window)
    assert alone.ahead == 1 and mixed.ahead < 1 and mixed.window == 2 * alone.window


def test_among__a_larger_share_holds_a_smaller_one() -> None:
    numbers = numbers_of(np.arange(100_000))
    shares = [among(numbers, share) for share in (0.0, 0.1, 0.5, 1.0)]
    assert [float(share.mean()) for share in shares] == pytest.approx([0, 0.1, 0.5, 1], abs=0.01)
    assert all((small <= large).all() for small, large in zip(shares, shares[1:], strict=False))


def test_needed_gb__is_round() -> None:
    assert needed_gb(6_000_000_000) == 12.7


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("machines", [8, 64])
def test_plan__there_is_room_for_what_a_machine_reads_of_a_window(machines: int, version: Literal[1, 2]) -> None:
    """Counted by the real order and shares, at the published batch: blocks at home, and those of moved samples."""
    config, batch = StreamConfig(window=512, assignment_version=version), 1_024
    order = Order(4 * 512 * 256, 3, config.block, config.window)
    assignment = assignment_of(machines, batch, config)
    read: list[set[int]] = [set() for _ in range(machines)]
    for start in range(0, 512 * 256, batch):
        blocks = order.blocks(order.samples(np.arange(start, start + batch)))
        node = assignment.moved_to(blocks)
        for machine in range(machines):
            read[machine].update(blocks[node == machine].tolist())
    plan = plan_reading(config, rows=order.rows, crop_bytes=30e3, remote=True, machines=machines)
    assert max(map(len, read)) * 256 * 30e3 <= 1.1 * plan.window
