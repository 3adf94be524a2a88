"""Every sample of a global batch goes to exactly one rank, ranks stay equal, and few samples leave their home."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.core.config import StreamConfig
from datapipe.sampling.epoch_order import Order
from datapipe.sampling.node_assignment import NodeAssignment
from datapipe.sampling.rank_assignment import Assignment
from tests.bench.reading import assignment_of, machines_per_block

VERSIONS: tuple[Literal[1, 2], ...] = (1, 2)

GOLDEN_RANKS = {
    1: [2, 0, 0, 0, 0, 1, 4, 2, 2, 2, 3, 3, 3, 1, 4, 1, 3, 1],
    2: [2, 0, 0, 0, 0, 1, 2, 4, 2, 2, 3, 3, 4, 1, 3, 1, 3, 1],
}
"""By version."""
READ_BY = {8: (1.64, 1.35), 16: (2.40, 1.60), 64: (6.18, 2.81)}
"""Machines that read a block of `test_ranks__few_machines_read_a_block`, by version 1 and 2."""


@settings(max_examples=150, deadline=None)
@given(
    nodes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    count=st.integers(1, 300),
    spare=st.integers(0, 4),
    blocks=st.integers(1, 80),
    seed=st.integers(0, 2**32),
    version=st.sampled_from([1, 2]),
)
def test_ranks__every_sample_once_and_as_many_for_each_rank_as_slices(
    nodes: list[int], count: int, spare: int, blocks: int, seed: int, version: Literal[1, 2]
) -> None:
    """`nodes`: ranks of each, which come in any order. Any number of samples, of blocks, of ranks, also where they do
    not divide."""
    world, random = sum(nodes), np.random.default_rng(seed)
    node_of_rank = random.permutation(np.repeat(range(len(nodes)), nodes))
    law = Assignment(-(-count // world) + spare, tuple(node_of_rank.tolist()), version=version)
    block = random.integers(0, blocks, count)
    ranks = law.ranks(block)
    slices = [law.slice(rank, count) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(slices), np.arange(count))
    assert np.bincount(ranks, minlength=world).tolist() == [len(part) for part in slices]
    at_home = NodeAssignment(law.nodes).homes(block)
    home = np.bincount(at_home, minlength=len(nodes))
    room = np.bincount(node_of_rank[ranks], minlength=len(nodes))
    moved, least = (law.moved_to(block) != at_home).sum(), np.maximum(home - room, 0).sum()
    if version == 1 or not least:
        assert moved == least


@pytest.mark.parametrize("nodes", [3, 127, 128, 300])
@pytest.mark.parametrize("count", [40, 1_000, 1_201])
def test_ranks__of_many_nodes_get_what_slices_give(nodes: int, count: int) -> None:
    """Also where most of them get nothing of a batch."""
    node_of_rank = np.repeat(range(nodes), 1 + np.arange(nodes) % 3)
    law = Assignment(-(-count // len(node_of_rank)), tuple(node_of_rank.tolist()))
    ranks = law.ranks(np.arange(count) // 2)
    slices = [len(law.slice(rank, count)) for rank in range(law.world)]
    assert np.bincount(ranks, minlength=law.world).tolist() == slices


def test_ranks__one_node_is_slicing() -> None:
    law = Assignment(4, (0, 0, 0))
    assert not law.by_node
    np.testing.assert_array_equal(law.ranks(np.arange(10) % 3), np.repeat([0, 1, 2], [4, 4, 2]))


@pytest.mark.parametrize("version", [1, 2])
def test_ranks__golden_values(version: Literal[1, 2]) -> None:
    """Pinned: all ranks of a run must agree, whatever libraries they have, and those that go on with it later."""
    law = Assignment(4, (0, 0, 1, 1, 2), version=version)
    blocks = np.array([5, 1, 7, 7, 1, 3, 2, 2, 9, 5, 4, 4, 8, 1, 6, 0, 5, 3])
    assert law.ranks(blocks).tolist() == GOLDEN_RANKS[version]


@pytest.mark.parametrize("nodes", READ_BY)
def test_ranks__few_machines_read_a_block(nodes: int) -> None:
    """Batches of 1,024 over a window of 512 blocks, eight ranks a machine: at 64 machines two samples a rank. Slicing
    would read each block on nearly all."""
    order = Order(4 * 512 * 256, 0, 256, 512)
    laws = [assignment_of(nodes, 1_024, StreamConfig(assignment_version=version)) for version in VERSIONS]
    found = [machines_per_block(order, law, 1_024) for law in laws]
    assert found == pytest.approx(READ_BY[nodes], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "read_at_most"), [(2, 1.05), (4, 1.15), (8, 1.25), (64, 1.8)])
def test_ranks__fewer_machines_read_a_block_in_larger_batches(nodes: int, read_at_most: float) -> None:
    """Batches of 4,096 of 100 M samples."""
    law = assignment_of(nodes, 4_096, StreamConfig())
    assert machines_per_block(Order(100_000_000, 0, 256, 2_048), law, 4_096) < read_at_most


def test_homes__are_in_proportion_to_the_ranks_of_a_node() -> None:
    law = NodeAssignment((0, 0, 0, 1))
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
