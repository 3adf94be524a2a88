"""Pure: which node gets each sample of a global batch, by the block that holds it.

Each block has a home: a node, the same in every epoch. Nodes have room for so many samples of a batch, some of them for
fewer than are at home there, and whoever gets a sample of a block reads the block. So samples without room at home
should be those of always the same few blocks, and go from each of these to always the same few nodes.

Version 1 moves the last blocks of a node, by a number that each block has, to whichever node has room. In version 2
nodes are the leaves of a balanced tree. From its root on, the two halves of a part of the tree get as many samples as
their nodes have room for: of the half with too many, samples cross to the other one, where their block has a home by
another hash. Those of the first blocks cross, by their number; at each level of the tree numbers are counted from where
those end that cross one level above, so that few blocks cross twice.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datapipe.core.randomness import Ints, UInts
from datapipe.sampling.epoch_order import scramble

_NUMBERS = 1 << 30
"""Numbers of blocks are below that."""
_HOME, _NUMBER = np.array([0], np.uint64), np.array([1 << 63], np.uint64)
"""Keys: of where a block is at home, and of its number."""
_LEVEL = 0x9E3779B97F4A7C15
"""Key of a block's homes in other halves, times the level of the tree, the root being 1."""
_DEVIATIONS = 8
"""Square of 2.8, the standard deviations of the number of samples in a half whose blocks cross at one level alone."""


class _Level(NamedTuple):
    """The halves of all parts of the tree at one level, from left to right; the right half of a single node is empty.
    The other half of half h is h ^ 1."""

    first: Ints
    """[halves] The first node of each half."""
    end: Ints
    """[halves] The first node that is not of each half."""
    first_rank: Ints
    """[halves] The first rank of each half, in the order of nodes."""
    ranks: Ints
    """[halves] How many ranks each half has."""
    of_node: NDArray[Any]
    """[nodes] The half that holds each node, in the smallest type that has room for it, which is sorted fastest."""
    key: UInts
    """[1] Of a block's homes in halves that it crosses to."""


@dataclass(frozen=True)
class NodeAssignment:
    """Nodes that share global batches; `nodes[rank]` is the number of the rank's node.

    Both versions take the block of each sample, int64 [n], and for how many samples each node has room, int64 [nodes],
    n in all; they return the node of each sample, int64 [n].
    """

    nodes: tuple[int, ...]

    def homes(self, blocks: Ints) -> Ints:
        """The node that each block is at home on, in proportion to the nodes' ranks; the same in every epoch."""
        return self._nodes[scramble(blocks, _HOME, np.array([len(self.nodes)]))]

    def first_with_room(self, blocks: Ints, room: Ints) -> Ints:
        """Version 1: what has no room at home goes to the first node with room."""
        nodes = self.homes(blocks)
        at_home = np.lexsort((_number(blocks), nodes))  # by home; there by block, in an order that is always the same
        count = np.bincount(nodes, minlength=len(room))
        surplus = at_home[_runs(np.cumsum(count) - count + room, count - room)]
        nodes[surplus] = np.repeat(np.arange(len(room)), np.maximum(room - count, 0))
        return nodes

    def half_by_half(self, blocks: Ints, room: Ints) -> Ints:
        """Version 2: what has no room in one half of the nodes goes to the other, and so on within each half."""
        count = len(blocks)
        number = _number(blocks)
        by_number = np.sort(number * count + np.arange(count)) % count
        blocks, number = blocks[by_number], number[by_number]
        nodes, held = self.homes(blocks), np.append(0, np.cumsum(room))
        crossing_from = 0
        for level, halves in enumerate(self._levels):
            first = int(np.searchsorted(number, crossing_from % _NUMBERS))
            half = halves.of_node[nodes]
            half = np.concatenate([half[first:], half[:first]])
            size = np.bincount(half, minlength=len(halves.ranks))
            surplus = size - (held[halves.end] - held[halves.first])
            crossing = np.argsort(half, kind="stable")[_runs(np.cumsum(size) - size, surplus)]
            to, place = half[crossing] ^ 1, (crossing + first) % count
            rank = halves.first_rank[to] + scramble(blocks[place], halves.key, halves.ranks[to])
            nodes[place] = self._by_node[rank]
            crossing_from += isqrt((_DEVIATIONS * _NUMBERS**2 << level) // count)
        assigned = np.empty_like(nodes)
        assigned[by_number] = nodes
        return assigned

    @cached_property
    def _nodes(self) -> Ints:
        return np.array(self.nodes)

    @cached_property
    def _by_node(self) -> Ints:
        """The node of each rank in the order of nodes."""
        return np.sort(self._nodes)

    @cached_property
    def _levels(self) -> list[_Level]:
        """From the root to where each half is a node."""
        levels, ends = list[_Level](), np.array([0, max(self.nodes) + 1])
        while (np.diff(ends) > 1).any():
            middle = (ends[:-1] + ends[1:] + 1) // 2
            ends = np.append(np.stack([ends[:-1], middle], axis=1), ends[-1])
            first_rank = np.searchsorted(self._by_node, ends)
            halves = np.arange(len(ends) - 1, dtype=np.min_scalar_type(len(ends)))
            of_node = np.repeat(halves, np.diff(ends))
            key = np.array([(len(levels) + 1) * _LEVEL % (1 << 64)], np.uint64)
            levels.append(_Level(ends[:-1], ends[1:], first_rank[:-1], np.diff(first_rank), of_node, key))
        return levels


def _number(blocks: Ints) -> Ints:
    """A pseudo-random number for each block, another one than that which decides its home."""
    return scramble(blocks, _NUMBER, np.array([_NUMBERS]))


def _runs(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1 ... for each start, as many as its length if that is positive."""
    lengths = np.maximum(lengths, 0)
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])
