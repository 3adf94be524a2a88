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
PORTION = 1 << 22
"""Crops that are sorted at once, about: what is needed besides the hashes themselves stays small."""
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
    first = _first_equal(content[:, 0], content[:, 1], keys=content[:, 0])
    return _marks(first)


def near_duplicates(hashes: np.ndarray, groups: np.ndarray) -> Marks:
    """Crops within DISTANCE of an earlier crop of their group that is no near duplicate itself; the first such one.

    hashes, groups: uint64[n]. Group 0 are the crops that are not compared.
    """
    # The first crop of each lot with equal hashes stands for it, so that a huge lot costs no more than a single crop.
    first = _first_equal(hashes, groups, keys=_mixed(hashes, groups))
    stands = first == np.arange(len(first), dtype=first.dtype)
    original = np.arange(len(first), dtype=first.dtype)
    nodes, originals = _originals(_pairs(hashes, groups, stands & (groups != 0)))
    original[nodes] = originals
    original = original[first]
    alone = groups == 0
    original[alone] = np.flatnonzero(alone)
    return _marks(original)


def _first_equal(one: np.ndarray, two: np.ndarray, *, keys: np.ndarray) -> np.ndarray:
    """For each crop the place of the first one with the same two words; equal words have equal keys."""
    first = np.arange(len(keys), dtype=_place_type(len(keys)))
    for members in _portions(keys):
        order = members[np.argsort(keys[members])]
        differs = _new(one[order]) | _new(two[order])
        if (differs & ~_new(keys[order])).any():  # a key shared by chance need not bring equal ones together
            order = members[np.lexsort((two[members], one[members]))]
            differs = _new(one[order]) | _new(two[order])
        begins = np.flatnonzero(differs)
        counts = np.diff(np.append(begins, len(order)))
        first[order] = np.repeat(np.minimum.reduceat(order, begins), counts)
    return first


def _marks(original: np.ndarray) -> Marks:
    places = np.flatnonzero(original != np.arange(len(original), dtype=original.dtype))
    return Marks(places, original[places].astype(np.int64))


# ----------------------------------------------------------------------------------------------------- similar hashes


def _originals(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places that duplicate another one, the place of that one). pairs: int64[n, 2], the earlier crop first.

    In rounds: kept is who has no earlier neighbour left that might be kept. Places follow a hash, so that chains of
    neighbours in ascending order are short, and so the rounds few.
    """
    nodes, flat = np.unique(pairs, return_inverse=True)
    numbered = flat.reshape(-1, 2)
    kept, dropped = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
    undecided = numbered
    while len(undecided):
        earlier, later = undecided.T
        waiting = np.zeros(len(nodes), bool)
        waiting[later] = True
        kept[earlier] |= ~waiting[earlier]
        dropped[later[kept[earlier]]] = True
        undecided = undecided[~(dropped[earlier] | dropped[later])]
    earlier, later = numbered[~dropped[numbered[:, 0]]].T
    originals = np.arange(len(nodes))
    np.minimum.at(originals, later, earlier)
    return nodes[dropped], nodes[originals[dropped]]


def _pairs(hashes: np.ndarray, groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64[pairs, 2]: all pairs of chosen crops of one group within DISTANCE, the earlier one first, each once."""
    chunks = [np.empty(0, np.int64)]
    for one, two in combinations(_BANDS, 2):
        for members in _portions(_mixed(hashes & np.uint64(one | two), groups), chosen):
            rest = [band for band in _BANDS if band not in (one, two)]
            for left, right in _agreeing(hashes, groups, members, one | two, rest):
                chunks.append(_close(hashes, groups, left, right))
    pairs = np.unique(np.concatenate(chunks))
    return np.stack([pairs >> 32, pairs & 0xFFFF_FFFF], axis=1)


def _close(hashes: np.ndarray, groups: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Keep the pairs whose hashes are close; each as one number, the earlier member in its upper half."""
    near = np.bitwise_count(hashes[one] ^ hashes[two]) <= DISTANCE
    one, two = one[near].astype(np.int64), two[near].astype(np.int64)
    same = groups[one] == groups[two]
    one, two = one[same], two[same]
    return np.minimum(one, two) << 32 | np.maximum(one, two)


def _agreeing(
    hashes: np.ndarray, groups: np.ndarray, members: np.ndarray, bits: int, rest: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of members that agree in some bits; all close ones among them. `rest`: the other bits, as two bands."""
    keys = _mixed(hashes[members] & np.uint64(bits), groups[members])
    order = np.argsort(keys)
    lots, keys = members[order], keys[order]
    counts = np.diff(np.append(np.flatnonzero(_new(keys)), len(lots)))
    several = np.repeat(counts > 1, counts)
    lots, counts = lots[several], counts[counts > 1]
    ends = np.cumsum(counts)
    large = (counts > SMALL) & (sum(band.bit_count() for band in rest) > FEW_BITS)
    quarters = [half for band in rest for half in _halves(band)]
    for number in np.flatnonzero(large):
        lot = lots[ends[number] - counts[number] : ends[number]]
        for one, two in combinations(quarters, 2):
            others = [band for band in quarters if band not in (one, two)]
            yield from _agreeing(hashes, groups, lot, bits | one | two, others)
    yield from _all_pairs(lots, np.repeat(np.where(large, 0, ends), counts))


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


# ------------------------------------------------------------------------------------------------------------ sorting


def _portions(keys: np.ndarray, chosen: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Places, those of equal keys in the same portion; of the chosen crops alone if such are given."""
    portions = 1 << (len(keys) // PORTION).bit_length()
    for number in range(portions):
        here = keys & np.uint64(portions - 1) == np.uint64(number)
        members = np.flatnonzero(here if chosen is None else here & chosen).astype(_place_type(len(keys)))
        if len(members):
            yield members


def _place_type(count: int) -> type[np.signedinteger]:
    return np.int32 if count < 1 << 31 else np.int64


def _mixed(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One key for both. Two that differ may share a key: such pairs are compared in vain, no pair is missed."""
    key = groups * _MIX
    key ^= hashes
    key *= _MIX
    key ^= key >> np.uint64(32)
    return key


def _new(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before; the first one does."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return new
