"""Pure: which rank gets which sample of a global batch. Whoever gets it, the batch is the same set of samples.

Slicing gives rank after rank its run of neighbours, so that every node reads nearly every block. By nodes, a sample
goes to a rank of the node that its block is at home on, as far as there is room: see `node_assignment`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from datapipe.core.randomness import Ints
from datapipe.sampling.epoch_order import SampleOrder
from datapipe.sampling.node_assignment import NodeAssignment

DRAWN_AT_ONCE = 4_096
"""Places of the stream that the order is asked for at a time: a call costs as much for 100 as for 1,000 of them."""


@dataclass(frozen=True)
class Assignment:
    """Shares of global batches: `rows` per rank, padding included; `nodes[rank]` is the number of the rank's node.

    Rank r has as many real rows of a batch in all ways of sharing: all that slicing gives it. `together` neighbours
    stay with one rank where there is room for that. `version`: of the rule by which nodes share.
    """

    rows: int
    nodes: tuple[int, ...]
    together: int = 1
    version: Literal[1, 2] = 2

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    @cached_property
    def by_node(self) -> bool:
        """Is there anything to share by nodes? Else slicing is all there is."""
        return len(set(self.nodes)) > 1 and self.together == 1

    def slice(self, rank: int, count: int) -> Ints:
        """The places 0 .. count - 1 of a global batch that slicing gives this rank, int64, ascending."""
        return np.arange(*np.minimum(np.array([rank, rank + 1]) * self._per_rank(count), count))

    def ranks(self, blocks: Ints) -> Ints:
        """The rank of each place of a global batch, by the homes of its samples' blocks; int64 [count]."""
        nodes = self.moved_to(blocks).astype(np.min_scalar_type(max(self.nodes)))  # small types are sorted faster
        ranks = np.empty(len(blocks), dtype=np.int64)
        ranks[np.argsort(nodes, kind="stable")] = np.repeat(self._by_node, self._lengths(len(blocks))[self._by_node])
        return ranks

    def moved_to(self, blocks: Ints) -> Ints:
        """The node of each place: its block's home, or another one where there is no room; int64 [count]."""
        room = np.zeros(max(self.nodes) + 1, dtype=np.int64)
        np.add.at(room, np.array(self.nodes), self._lengths(len(blocks)))
        shared = self._shared
        return shared.half_by_half(blocks, room) if self.version == 2 else shared.first_with_room(blocks, room)

    @cached_property
    def _shared(self) -> NodeAssignment:
        return NodeAssignment(self.nodes)

    @cached_property
    def _by_node(self) -> Ints:
        """The ranks, those of a node together."""
        return np.argsort(np.array(self.nodes), kind="stable")

    def _lengths(self, count: int) -> Ints:
        """How many places of a global batch slicing gives each rank."""
        return np.diff(np.minimum(np.arange(self.world + 1) * self._per_rank(count), count))

    def _per_rank(self, count: int) -> int:
        whole = self.rows - self.rows % self.together
        return whole if whole * self.world >= count else self.rows


class RankBatch(NamedTuple):
    """One rank's positions and sample ids of a global batch, int64 [rows], ascending; -1 pads them at the end."""

    batch: range
    positions: Ints
    samples: Ints


def shares(order: SampleOrder, assignment: Assignment, rank: int, batches: Iterator[range]) -> Iterator[RankBatch]:
    """The rank's share of each of these ranges of positions."""
    by_node, rows = assignment.by_node, assignment.rows
    several = -(-DRAWN_AT_ONCE // (rows * assignment.world if by_node else rows))
    while some := list(islice(batches, several)):
        drawn = [np.arange(batch.start, batch.stop) if by_node else batch.start + assignment.slice(rank, len(batch))
                 for batch in some]  # fmt: skip
        ends = np.cumsum([len(positions) for positions in drawn])
        samples_of_batch = np.split(order.samples(np.concatenate(drawn)), ends[:-1])
        for batch, positions, samples in zip(some, drawn, samples_of_batch, strict=True):
            mine = assignment.ranks(order.blocks(samples)) == rank if by_node else slice(None)
            yield RankBatch(batch, _padded(positions[mine], rows), _padded(samples[mine], rows))


def _padded(values: Ints, rows: int) -> Ints:
    return np.append(values, np.full(rows - len(values), -1, dtype=np.int64))
