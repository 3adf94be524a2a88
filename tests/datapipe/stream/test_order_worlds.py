"""All ranks together see every place of the stream exactly once, in any world, with any order, after any restart."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.sampling.epoch_order import Order, SampleOrder
from datapipe.sampling.identity_sampler import IdentityOrder
from datapipe.sampling.mixture import MixedOrder, whole_weights
from datapipe.sampling.rank_assignment import Assignment, shares

NODES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
"""Ranks of each node."""


@st.composite
def worlds(draw: st.DrawFn, batch: int) -> Assignment:
    """Any nodes, sharing by slices or by nodes, any micro-batch."""
    ranks = draw(NODES)
    world, micro = sum(ranks), draw(st.integers(1, 9))
    by_node = draw(st.booleans())
    nodes = np.repeat(range(len(ranks)), ranks).tolist() if by_node else [0] * world
    return Assignment(-(-batch // (world * micro)) * micro, tuple(nodes), version=draw(st.sampled_from([1, 2])))


def seen_by_all(order: SampleOrder, world: Assignment, batches: list[range]) -> dict[int, int]:
    """Position -> sample, over all ranks; no place may come twice, and padding must come last."""
    seen: dict[int, int] = {}
    for rank in range(world.world):
        for batch, positions, samples in shares(order, world, rank, iter(batches)):
            real = int((positions >= 0).sum())
            assert len(positions) == len(samples) == world.rows
            assert (positions[real:] == -1).all() and (samples[real:] == -1).all()
            assert (np.diff(positions[:real]) > 0).all()
            assert set(positions[:real].tolist()) <= set(batch)
            assert not set(positions[:real].tolist()) & seen.keys()
            seen.update(zip(positions[:real].tolist(), samples[:real].tolist(), strict=True))
    return seen


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=4), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6),
    batch=st.integers(1, 40), kills=st.lists(st.integers(1, 6), max_size=3), data=st.data(),
)  # fmt: skip
def test_shares__each_sample_exactly_once_per_epoch(
    rows: list[int], seed: int, epoch: int, batch: int, kills: list[int], data: st.DataObject
) -> None:
    """Of a plain order or a mix by rows, over an epoch that a run spends in several worlds, one after the other."""
    orders = tuple(Order(count, seed + number, 4, 3) for number, count in enumerate(rows))
    order: SampleOrder = MixedOrder(orders, whole_weights(rows)) if len(rows) > 1 else orders[0]
    first, end = epoch * order.rows, (epoch + 1) * order.rows
    begin = first // batch * batch
    batches = [range(start, start + batch) for start in range(begin, end, batch)]
    seen: dict[int, int] = {}
    cuts = [0, *accumulate(kills), len(batches)]
    for low, high in zip(cuts, cuts[1:], strict=False):
        seen |= seen_by_all(order, data.draw(worlds(batch)), batches[low:high])
    positions = np.arange(begin, batches[-1].stop)
    assert [seen[position] for position in positions.tolist()] == order.samples(positions).tolist()
    assert sorted(seen[position] for position in range(first, end)) == list(range(order.rows))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(1, 5), min_size=2, max_size=4), start=st.integers(0, 10**9),
       batch=st.integers(1, 40), data=st.data())  # fmt: skip
def test_shares__a_weighted_mix_is_the_same_in_any_world(
    weights: list[int], start: int, batch: int, data: st.DataObject
) -> None:
    order = MixedOrder(tuple(Order(9 + number, number, 4, 3) for number in range(len(weights))), tuple(weights))
    batches = [range(low, low + batch) for low in range(start, start + 3 * batch, batch)]
    batches[-1] = range(batches[-1].start, batches[-1].start + max(1, batch // 2))  # the stream may end in a batch
    seen = seen_by_all(order, data.draw(worlds(batch)), batches)
    positions = np.arange(start, batches[-1].stop)
    assert [seen[position] for position in positions.tolist()] == order.samples(positions).tolist()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(ranks=NODES, micro=st.integers(1, 9), start=st.integers(0, 1000))
def test_shares__ranks_get_whole_groups_of_an_identity(ranks: list[int], micro: int, start: int) -> None:
    labels = np.arange(200) % 23
    order = IdentityOrder(labels, seed=0, identities=8, instances=4)
    world, batches = sum(ranks), [range(32 * batch, 32 * batch + 32) for batch in range(start, start + 3)]
    law = Assignment(-(-32 // (world * micro)) * micro, tuple(np.repeat(range(len(ranks)), ranks).tolist()), 4)
    assert len(seen_by_all(order, law, batches)) == 96
    if law.rows // 4 * 4 * world < 32:
        return  # no room for whole groups
    for rank in range(world):
        for _, _, samples in shares(order, law, rank, iter(batches)):
            groups = labels[samples[samples >= 0]].reshape(-1, 4)
            assert (groups == groups[:, :1]).all()


def test_blocks__of_a_mix_are_those_of_its_data_sets() -> None:
    order = MixedOrder((Order(10, 0, 4, 2), Order(5, 0, 5, 2), Order(3, 0, 2, 2)), (1, 1, 1))
    assert order.blocks(np.arange(18)).tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 5 + [4] * 2 + [5]
