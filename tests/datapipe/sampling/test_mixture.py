"""A mix keeps its proportions in every prefix, each data set its own epochs; its values are pinned."""

from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datapipe.core.errors import ConfigError
from datapipe.sampling.epoch_order import Order
from datapipe.sampling.mixture import LARGEST_TOTAL, MixedOrder, Schedule, whole_weights

GOLDEN_SCHEDULE = "02100201200210020120"
GOLDEN_MIX = [4, 20, 8, 5, 22, 7, 3, 23, 6, 14, 24, 12, 17, 21, 15, 16, 25, 13, 11, 27]
GOLDEN_LARGE = "784494e24feaad309bbbe8d8c71aee19e8c04877"


def levels(sets: int) -> int:
    return (sets - 1).bit_length()


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=8).map(tuple), rounds=st.integers(0, 10**9))
@example(weights=(59, 1, 1, 60), rounds=0)
@example(weights=(1, 60, 60, 60, 1, 60, 30, 30), rounds=3)
def test_schedule__every_prefix_has_the_right_proportions(weights: tuple[int, ...], rounds: int) -> None:
    """Against counting: every data set's places in order, none left out, its share never far from its weight."""
    total = sum(weights)
    start = rounds * total
    chosen, own = Schedule(weights).places(start + np.arange(2 * total))
    for number, weight in enumerate(weights):
        mine = chosen == number
        np.testing.assert_array_equal(own[mine], rounds * weight + np.arange(2 * weight))
        so_far = np.cumsum(mine)
        error = np.abs(so_far * total - np.arange(1, 2 * total + 1) * weight)
        assert 2 * error.max() <= levels(len(weights)) * total
        assert len(weights) > 4 or error.max() <= total  # within one sample


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, LARGEST_TOTAL // 5), min_size=2, max_size=5).map(tuple),
    position=st.integers(0, 2**61),
)
@example(weights=(LARGEST_TOTAL - 1, 1), position=2**61)
@example(weights=(1, LARGEST_TOTAL - 1), position=LARGEST_TOTAL - 1)
def test_schedule__is_exact_for_large_weights_and_positions(weights: tuple[int, ...], position: int) -> None:
    """Against the same rule in unbounded integers."""
    chosen, own = Schedule(weights).places(np.array([position]))
    sets, place = list(range(len(weights))), position
    while len(sets) > 1:
        half = (len(sets) + 1) // 2
        share = Fraction(sum(weights[n] for n in sets[:half]), sum(weights[n] for n in sets))
        before, after = ((2 * q * share + 1) // 2 for q in (place, place + 1))
        sets, place = (sets[:half], before) if after > before else (sets[half:], place - before)
    assert (chosen.tolist(), own.tolist()) == (sets, [place])


def test_schedule__golden_values() -> None:
    assert "".join(map(str, Schedule((5, 2, 3)).places(np.arange(20))[0])) == GOLDEN_SCHEDULE


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 90), min_size=1, max_size=6), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6)
)
def test_samples__a_mix_by_rows_is_a_permutation_in_every_epoch(rows: list[int], seed: int, epoch: int) -> None:
    orders = tuple(Order(count, seed + number, 7, 3) for number, count in enumerate(rows))
    mix = MixedOrder(orders, whole_weights(rows))
    assert mix.rows == sum(rows)
    samples = mix.samples(epoch * mix.rows + np.arange(mix.rows))
    np.testing.assert_array_equal(np.sort(samples), np.arange(mix.rows))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 80), min_size=2, max_size=5),
    data=st.data(),
    offset=st.integers(0, 10**9),
    pieces=st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_samples__each_data_set_goes_through_its_own_order(
    rows: list[int], data: st.DataObject, offset: int, pieces: list[int]
) -> None:
    """However the positions are asked for, and wherever they start."""
    weights = tuple(data.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows))))
    orders = tuple(Order(count, number, 4, 2) for number, count in enumerate(rows))
    mix = MixedOrder(orders, weights)
    positions = offset + np.arange(sum(pieces))
    together = mix.samples(positions)
    parts = [mix.samples(part) for part in np.split(positions, np.cumsum(pieces))]
    np.testing.assert_array_equal(np.concatenate(parts), together)
    np.testing.assert_array_equal(mix.samples(positions[::-1])[::-1], together)
    chosen, own = Schedule(weights).places(positions)
    first = np.cumsum([0, *rows])
    for number, order in enumerate(orders):
        mine = chosen == number
        np.testing.assert_array_equal(together[mine], first[number] + order.samples(own[mine]))


def test_samples__golden_values() -> None:
    """Pinned: no library release may change them. If we change them, ORDER_VERSION goes up."""
    small = MixedOrder((Order(20, 0, 3, 2), Order(9, 1, 3, 2)), (2, 1))
    assert small.samples(np.arange(20)).tolist() == GOLDEN_MIX
    large = MixedOrder((Order(60_000_000, 3, 256, 2048), Order(39_999_999, 4, 256, 2048), Order(17, 5, 256, 2048)),
                       whole_weights([0.5, 0.3, 0.2]))  # fmt: skip
    found = large.samples(10**9 + np.arange(1000)).astype("<i8").tobytes()
    assert sha256(found).hexdigest()[:40] == GOLDEN_LARGE


@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [((0.7, 0.3), (7, 3)), ((4180243, 4180243), (1, 1)), ((1,), (1,)), ((0.1, 1e-3, 2), (100, 1, 2000)),
     ((100_000_000, 4_180_243), (100_000_000, 4_180_243))],
)  # fmt: skip
def test_whole_weights__are_in_the_same_proportion(given_weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert whole_weights(given_weights) == expected


@pytest.mark.parametrize("wrong", [(1.0, 0.0), (1.0, -2.0), (float("nan"), 1.0), (float("inf"), 1.0), (1e-12, 1.0)])
def test_whole_weights__refuses_what_is_no_proportion(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        whole_weights(wrong, where="stream.weights")


def test_mix__refuses_impossible_weights() -> None:
    for wrong in ((), (1, 0), (LARGEST_TOTAL, 1)):
        with pytest.raises(ValueError, match="impossible"):
            Schedule(wrong)
    with pytest.raises(ValueError, match="1 orders and 2 weights"):
        MixedOrder((Order(5, 0, 1, 1),), (1, 2))
