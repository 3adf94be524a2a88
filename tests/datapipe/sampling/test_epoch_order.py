"""Each epoch of the order is a permutation, whatever the sizes; its values are pinned."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datapipe.core.randomness import words
from datapipe.sampling.epoch_order import ORDER_VERSION, Order, _ceil_sqrt, _decrypt, encrypt

GOLDEN_SMALL = [1, 8, 2, 7, 0, 6, 9, 5, 4, 3, 4, 3, 5, 8, 7, 6, 1, 0, 9, 2]
GOLDEN_LARGE = [4043850, 6136074, 65236501, 1888103, 87836885, 95118200]
GOLDEN_EPOCHS = {
    (4_999, 0, 64, 5): "a738f44a0a1ee195",
    (4_180_243, 2**63 + 11, 256, 2048): "12f4ee19581084dd",
    (3_000_000_019, 5, 100, 500): "ebc1b44fbc667590",
}
"""(rows, seed, block, window): digest of 3 000 samples about the end of the third epoch."""


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return order.samples(np.arange(epoch * order.rows, (epoch + 1) * order.rows))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 700),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**31),
    block=st.integers(1, 80),
    window=st.integers(1, 20),
)
@example(rows=1, seed=0, epoch=0, block=256, window=2048)
@example(rows=257, seed=0, epoch=1, block=256, window=1)
@example(rows=33, seed=3, epoch=2, block=8, window=2)
def test_samples__are_a_permutation_in_every_epoch(rows: int, seed: int, epoch: int, block: int, window: int) -> None:
    order = Order(rows, seed, block, window)
    np.testing.assert_array_equal(np.sort(epoch_of(order, epoch)), np.arange(rows))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 2000),
    offset=st.integers(0, 10**6),
    block=st.integers(1, 300),
    window=st.integers(1, 9),
    pieces=st.lists(st.integers(0, 400), max_size=5),
)
def test_samples__do_not_depend_on_how_they_are_asked(
    rows: int, offset: int, block: int, window: int, pieces: list[int]
) -> None:
    order = Order(rows, 5, block, window)
    positions = offset + np.arange(sum(pieces))
    parts = [order.samples(part) for part in np.split(positions, np.cumsum(pieces))]
    together = order.samples(positions)
    np.testing.assert_array_equal(np.concatenate(parts), together)
    np.testing.assert_array_equal(order.samples(positions[::-1])[::-1], together)


def test_samples__golden_values() -> None:
    """Pinned: no library release may change them. If we change them, ORDER_VERSION goes up."""
    assert ORDER_VERSION == 1
    assert Order(10, 0, 3, 2).samples(np.arange(20)).tolist() == GOLDEN_SMALL
    assert Order(100_000_000, 7, 256, 2048).samples(10**8 - 3 + np.arange(6)).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("sizes", GOLDEN_EPOCHS)
def test_samples__golden_digests(sizes: tuple[int, int, int, int]) -> None:
    order = Order(*sizes)
    found = order.samples(3 * order.rows - 1_500 + np.arange(3_000)).astype("<i8").tobytes()
    assert sha256(found).hexdigest()[:16] == GOLDEN_EPOCHS[sizes]


def test_samples__epochs_and_seeds_differ() -> None:
    order = Order(500, 1, 10, 4)
    first = epoch_of(order, 0)
    for other in (epoch_of(order, 1), epoch_of(order, 2), epoch_of(Order(500, 2, 10, 4), 0)):
        assert (first == other).mean() < 0.05


@pytest.mark.parametrize(("rows", "block", "window"), [(2000, 50, 8), (2000, 1, 1), (1990, 64, 5), (1990, 3000, 1)])
def test_samples__every_sample_comes_anywhere_in_the_epoch(rows: int, block: int, window: int) -> None:
    """Over many seeds the mean place of each part of the rows is the middle: nothing is pinned, ragged or not."""
    order = [epoch_of(Order(rows, seed, block, window), 0) for seed in range(60)]
    places = np.mean([np.argsort(samples) for samples in order], axis=0) / rows
    tenths = places.reshape(10, -1).mean(axis=1)
    assert np.abs(tenths - 0.5).max() < 0.12
    last = np.array([np.argsort(samples)[-(rows % block or block) :].mean() for samples in order]) / rows
    assert 0.35 < last.mean() < 0.65


def test_samples__neighbours_are_scattered() -> None:
    """A batch of 100 out of ordered shards of 1 000 touches nearly as many shards as an ideal shuffle would (19.9)."""
    order = Order(20_000, 3, 100, 200)
    touched = [len(np.unique(batch // 1000)) for batch in epoch_of(order, 0).reshape(-1, 100)]
    assert np.mean(touched) > 19.5
    steps = np.abs(np.diff(epoch_of(order, 0)))
    assert abs(steps.mean() / 20_000 - 1 / 3) < 0.02


def test_samples__a_window_reads_only_its_own_blocks() -> None:
    order = Order(10_000, 3, 50, 10)
    touched = [len(np.unique(window // 50)) for window in epoch_of(order, 0).reshape(-1, 500)]
    assert touched == [10] * 20


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 97, 1000])
def test_encrypt__is_uniform_over_keys(size: int) -> None:
    """Chi-square of where the first value goes, over 3 000 keys."""
    keys = words(0, "test", np.arange(3000), 8)
    images = encrypt(np.zeros(3000, dtype=np.int64), np.array([size]), keys)
    counts = np.bincount(images, minlength=size)
    expected = 3000 / size
    assert ((counts - expected) ** 2 / expected).sum() < size + 5 * (2 * size) ** 0.5


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**61), seed=st.integers(0, 2**32), at=st.floats(0, 1, exclude_max=True))
def test_decrypt__inverts(size: int, seed: int, at: float) -> None:
    keys = words(seed, "test", np.array([0]), 8)
    value = np.minimum(np.array([int(at * size), 0, size - 1]), size - 1)
    hidden = encrypt(value, np.array([size]), keys)
    assert ((hidden >= 0) & (hidden < size)).all()
    np.testing.assert_array_equal(_decrypt(hidden, np.array([size]), keys), value)


@settings(max_examples=100, deadline=None)
@given(root=st.integers(1, 2**31 - 1), around=st.integers(-1, 1))
def test_ceil_sqrt__is_exact(root: int, around: int) -> None:
    size = max(1, root * root + around)
    found = int(_ceil_sqrt(np.array([size]))[0])
    assert (found - 1) ** 2 < size <= found**2


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_order__refuses_impossible_sizes(wrong: tuple[int, int, int]) -> None:
    rows, block, window = wrong
    with pytest.raises(ValueError, match="at least 1"):
        Order(rows, 0, block, window)
