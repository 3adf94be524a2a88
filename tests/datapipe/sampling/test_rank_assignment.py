"""Every sample of a global batch goes to exactly one rank, ranks stay equal, and few samples leave their home."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.sampling.epoch_order import Order
from datapipe.sampling.rank_assignment import Assignment

GOLDEN_RANKS = [2, 0, 0, 0, 0, 1, 4, 2, 2, 2, 3, 3, 3, 1, 4, 1, 3, 1]


@settings(max_examples=150, deadline=None)
@given(
    nodes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    count=st.integers(1, 300),
    spare=st.integers(0, 4),
    blocks=st.integers(1, 80),
    seed=st.integers(0, 2**32),
)
def test_ranks__every_sample_once_and_as_many_for_each_rank_as_slices(
    nodes: list[int], count: int, spare: int, blocks: int, seed: int
) -> None:
    """`nodes`: ranks of each. Any number of samples, of blocks, of ranks, also where they do not divide."""
    world = sum(nodes)
    law = Assignment(-(-count // world) + spare, tuple(np.repeat(range(len(nodes)), nodes).tolist()))
    block = np.random.default_rng(seed).integers(0, blocks, count)
    ranks = law.ranks(block)
    slices = [law.slice(rank, count) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(slices), np.arange(count))
    assert np.bincount(ranks, minlength=world).tolist() == [len(part) for part in slices]
    moved = law.moved_to(block) != law.homes(block)
    home = np.bincount(law.homes(block), minlength=len(nodes))
    room = np.bincount(np.array(law.nodes)[ranks], minlength=len(nodes))
    assert moved.sum() == np.maximum(home - room, 0).sum()  # not one more than must


def test_ranks__one_node_is_slicing() -> None:
    law = Assignment(4, (0, 0, 0))
    assert not law.by_node
    np.testing.assert_array_equal(law.ranks(np.arange(10) % 3), np.repeat([0, 1, 2], [4, 4, 2]))


def test_ranks__golden_values() -> None:
    """Pinned: all ranks of a run must agree, whatever libraries they have."""
    law = Assignment(4, (0, 0, 1, 1, 2))
    assert law.ranks(np.array([5, 1, 7, 7, 1, 3, 2, 2, 9, 5, 4, 4, 8, 1, 6, 0, 5, 3])).tolist() == GOLDEN_RANKS


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "moved_at_most", "read_at_most"), [(2, 0.02, 1.1), (4, 0.03, 1.25), (8, 0.04, 1.6)])
def test_ranks__few_samples_move_and_few_blocks_are_read_twice(
    nodes: int, moved_at_most: float, read_at_most: float
) -> None:
    """Batches of 4 096 of 100 M samples over one window, eight ranks a node. Slicing would read each block on all."""
    order, block, window = Order(100_000_000, 0, 256, 2048), 256, 2048
    law = Assignment(4096 // (8 * nodes), tuple(np.repeat(range(nodes), 8).tolist()))
    read, moved = set(), []
    for start in range(0, block * window, 4096):
        blocks = order.samples(start + np.arange(4096)) // block
        to = law.moved_to(blocks)
        moved.append((to != law.homes(blocks)).mean())
        read |= set(zip(blocks.tolist(), to.tolist(), strict=True))
    assert np.mean(moved) < moved_at_most
    assert len(read) / window < read_at_most


def test_homes__are_in_proportion_to_the_ranks_of_a_node() -> None:
    law = Assignment(1, (0, 0, 0, 1))
    assert abs((law.homes(np.arange(40_000)) == 0).mean() - 0.75) < 0.01


@pytest.mark.parametrize(
    ("rows", "world", "together", "expected"),
    [(24, 3, 4, [24, 24, 16]), (22, 3, 4, [22, 22, 20]), (16, 4, 4, [16] * 4), (18, 4, 4, [16] * 4)],
)
def test_slice__keeps_neighbours_together_where_there_is_room(
    rows: int, world: int, together: int, expected: list[int]
) -> None:
    """64 samples in groups of four."""
    law = Assignment(rows, tuple(range(world)), together)
    parts = [law.slice(rank, 64) for rank in range(world)]
    assert [len(part) for part in parts] == expected
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(64))
    assert not law.by_node
