"""Which crops are there twice: exactly, anywhere in a data set, or nearly, within a source or a track. Pure.

Crops are numbered by their place in the data set's order; of several duplicates the first one is the original.

Nearly equal are difference hashes that differ in at most two of 64 bits. Split into four bands, two such hashes agree
in two bands at least; so all pairs are found among those that agree in one of the six pairs of bands (multi-index
hashing: Norouzi, Punjani, Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012). Where many
hashes agree in the same two bands, those crops are split by pairs of bands of the remaining bits, and so on: no bucket
ever costs the square of its size.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

DISTANCE = 2
"""Bits in which near duplicates differ at most. From 4 on, different people in similar clothes are taken for one."""
SMALL = 512
"""Crops with equal bands that are simply compared with one another."""
FEW_BITS = 8
"""Bits not worth splitting: so few tell at most 256 crops apart."""
_BANDS = tuple(0x1111_1111_1111_1111 << band for band in range(4))
"""Every fourth bit: neighbours in the picture, which tend to be equal together, come into different bands."""
_MIX = np.uint64(0x9E37_79B9_7F4A_7C15)


class Marks(NamedTuple):
    """The duplicates among some crops."""

    places: np.ndarray
    """int64[duplicates], ascending."""
    originals: np.ndarray
    """int64[duplicates]: the place of what each of them duplicates; always an earlier one, and no duplicate itself."""


def exact_duplicates(content: np.ndarray) -> Marks:
    """Crops with the content hash uint64[n, 2] of an earlier one."""
    order = _by_content(content)
    begins = _changes(content[order])
    return _marks(order, begins)


def near_duplicates(hashes: np.ndarray, groups: np.ndarray) -> Marks:
    """Crops within DISTANCE of an earlier crop of their group that is no near duplicate itself; the first such one.

    hashes, groups: uint64[n]. Group 0 are the crops that are not compared.
    """
    compared = np.flatnonzero(groups)
    hashes, groups = hashes[compared], groups[compared]
    order = np.argsort(_mixed(hashes, groups))
    begins = np.flatnonzero(np.concatenate([[True], _differ(hashes, order) | _differ(groups, order)])[:len(order)])
    if not len(order):
        return Marks(compared, compared)
    alike = np.minimum.reduceat(order, begins)  # the first crop of each lot with equal hashes stands for it
    nodes = np.sort(alike)
    original = _original(nodes, _pairs(hashes[nodes], groups[nodes]))
    lot = np.repeat(np.searchsorted(nodes, alike), np.diff(np.append(begins, len(order))))
    target = np.empty(len(order), np.int64)
    target[order] = original[lot]
    marked = np.flatnonzero(target != np.arange(len(target)))
    return Marks(compared[marked], compared[target[marked]])


# ---------------------------------------------------------------------------------------------------- equal contents


def _by_content(content: np.ndarray) -> np.ndarray:
    """Rows sorted by content. One word of a cryptographic hash nearly always tells; only where it does not, both."""
    order = np.argsort(content[:, 0])
    first = content[order, 0]
    as_before = np.zeros(len(order) + 1, bool)
    as_before[1:-1] = first[1:] == first[:-1]
    doubtful = as_before[1:] | as_before[:-1]
    rows = order[doubtful]
    order[doubtful] = rows[np.lexsort((content[rows, 1], content[rows, 0]))]
    return order


def _changes(content: np.ndarray) -> np.ndarray:
    """Rows of a sorted table that differ from the one before; the first one always does."""
    return np.flatnonzero(np.concatenate([[True], (content[1:] != content[:-1]).any(axis=1)])[:len(content)])


def _marks(order: np.ndarray, begins: np.ndarray) -> Marks:
    """Of each lot of equal crops (order[begins[i]:begins[i + 1]]) all but the first."""
    counts = np.diff(np.append(begins, len(order)))
    several = np.flatnonzero(np.repeat(counts > 1, counts))
    members = order[several].astype(np.int64)
    counts = counts[counts > 1]
    if not len(counts):
        return Marks(members, members)
    first = np.repeat(np.minimum.reduceat(members, np.cumsum(counts) - counts), counts)
    later = np.flatnonzero(members != first)
    later = later[np.argsort(members[later])]
    return Marks(members[later], first[later])


# ----------------------------------------------------------------------------------------------------- similar hashes


def _original(nodes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """For each node the place of the one it duplicates, or its own. pairs int64[n, 2]: (earlier, later) node.

    In rounds: kept is who has no earlier neighbour left that might be kept. Places follow a hash, so that chains of
    neighbours in ascending order are short, and so the rounds few.
    """
    original = nodes.copy()
    kept, dropped = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
    open_pairs = pairs
    while len(open_pairs):
        waiting = np.zeros(len(nodes), bool)
        waiting[open_pairs[:, 1]] = True
        kept[open_pairs[:, 0]] |= ~waiting[open_pairs[:, 0]]
        dropped[open_pairs[kept[open_pairs[:, 0]], 1]] = True
        open_pairs = open_pairs[~(dropped[open_pairs[:, 0]] | dropped[open_pairs[:, 1]])]
    told = pairs[~dropped[pairs[:, 0]]]
    np.minimum.at(original, told[:, 1], nodes[told[:, 0]])
    return original


def _pairs(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """int64[pairs, 2]: all pairs of one group within DISTANCE, the earlier one first, each once."""
    found = [_close(hashes, groups, one, two)
             for one, two in _candidates(hashes, groups, np.arange(len(hashes)), _BANDS)]
    pairs = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    return np.stack([pairs >> 32, pairs & 0xFFFF_FFFF], axis=1)


def _close(hashes: np.ndarray, groups: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Those of the pairs that are close; each as one number, the earlier member in its upper half."""
    near = np.bitwise_count(hashes[one] ^ hashes[two]) <= DISTANCE
    one, two = one[near], two[near]
    same = groups[one] == groups[two]
    one, two = one[same], two[same]
    return np.minimum(one, two) << 32 | np.maximum(one, two)


def _candidates(hashes: np.ndarray, groups: np.ndarray, members: np.ndarray,
                bands: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of members, all close ones among them. The members agree in all bits outside the bands."""
    for one, two in combinations(range(len(bands)), 2):
        rest = [band for number, band in enumerate(bands) if number not in (one, two)]
        lots = members[np.argsort(_mixed(hashes[members] & np.uint64(bands[one] | bands[two]), groups[members]))]
        keys = _mixed(hashes[lots] & np.uint64(bands[one] | bands[two]), groups[lots])
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[:len(keys)])
        del keys
        counts = np.diff(np.append(begins, len(lots)))
        splits = sum(band.bit_count() for band in rest) > FEW_BITS
        large = (counts > SMALL) & splits
        for number in np.flatnonzero(large):
            lot = lots[begins[number]:begins[number] + counts[number]]
            yield from _candidates(hashes, groups, lot, [half for band in rest for half in _halves(band)])
        yield from _all_pairs(lots, np.repeat(np.where(large, 0, begins + counts), counts))


def _all_pairs(lots: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair within each lot; `ends`: for each position the end of its lot."""
    positions = np.arange(len(lots))
    step = 1
    while len(positions := positions[positions + step < ends[positions]]):
        yield lots[positions], lots[positions + step]
        step += 1


def _halves(band: int) -> tuple[int, int]:
    bits = [bit for bit in range(64) if band >> bit & 1]
    return sum(1 << bit for bit in bits[::2]), sum(1 << bit for bit in bits[1::2])


def _mixed(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One key for both. Two that differ may share a key: such pairs are compared in vain, no pair is missed."""
    key = (hashes ^ groups * _MIX) * _MIX
    return key ^ key >> np.uint64(32)


def _differ(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    arranged = values[order]
    return arranged[1:] != arranged[:-1]
