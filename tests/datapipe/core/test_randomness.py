"""The counter-based generator equals numpy's Philox, word for word."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from datapipe.core.randomness import draw, key, normal, uniform, words

GOLDEN = [
    [13588516369348949586, 6393601237347862094, 5344296144537128527, 11580609721238092269, 17150457657617389184],
    [17699593280175236213, 16686062810938767249, 2808929266271949551, 16171377041134906013, 6762295118559837209],
]

SEEDS = st.integers(-(2**63), 2**64)
POSITIONS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, positions=POSITIONS, count=st.integers(1, 13), purpose=st.text(max_size=20))
def test_words__equal_numpys_philox(seed: int, positions: list[int], count: int, purpose: str) -> None:
    ours = words(seed, purpose, np.array(positions), count)
    for row, position in enumerate(positions):
        counter = np.array([0, position, 0, 0], dtype=np.uint64)
        theirs = np.random.Philox(key=np.array(key(seed, purpose), dtype=np.uint64), counter=counter).random_raw(count)
        np.testing.assert_array_equal(ours[row], theirs)


def test_words__golden_values() -> None:
    """A change here changes every run: raise ORDER_VERSION and say so."""
    assert words(17, "golden", np.array([0, 2**40]), 5).tolist() == GOLDEN
    assert key(17, "golden") == (17, 5434833403847302432)


def test_draw__gives_what_single_calls_give() -> None:
    positions = np.array([5, 3, 10**12])
    together = draw(3, {"a": 5, "b": 1, "c": 8}, positions)
    for purpose, count in {"a": 5, "b": 1, "c": 8}.items():
        np.testing.assert_array_equal(together[purpose], uniform(3, purpose, positions, count))


def test_draw__of_nothing_is_empty() -> None:
    assert draw(0, {}, np.array([1, 2])) == {}
    assert words(0, "a", np.array([], dtype=np.int64), 3).shape == (0, 3)


def test_uniform__more_numbers_begin_with_the_fewer() -> None:
    few, many = (uniform(1, "a", np.arange(4), count) for count in (3, 9))
    np.testing.assert_array_equal(few, many[:, :3])


def test_uniform__purposes_seeds_and_positions_are_independent() -> None:
    base = uniform(1, "a", np.arange(2000), 4)
    for seed, purpose, start in ((1, "b", 0), (2, "a", 0), (1, "a", 1)):
        other = uniform(seed, purpose, np.arange(start, start + 2000), 4)
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.05


def test_uniform__is_uniform_from_zero_to_below_one() -> None:
    sample = uniform(11, "test", np.arange(4000), 5)
    assert sample.min() >= 0 and sample.max() < 1
    assert stats.kstest(sample.ravel(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("count", [1, 2, 5])
def test_normal__is_standard_normal(count: int) -> None:
    sample = normal(11, "test", np.arange(20_000 // count), count)
    assert sample.shape == (20_000 // count, count)
    assert stats.kstest(sample.ravel(), "norm").pvalue > 0.001
