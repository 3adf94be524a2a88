"""Pure: (seed, purpose, position) -> random numbers. Nothing else in the project draws during a step.

A counter-based generator (Philox4x64-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so
that a resumed, resized or differently threaded run draws the same numbers for the same place in the stream. The key
is (seed, hash of the purpose), the counter is (block, position, 0, 0): the words of one position are those of
`numpy.random.Philox(key=key(seed, purpose), counter=[0, position, 0, 0])`.
"""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = 2**64 - 1
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)


@lru_cache(maxsize=4096)
def key(seed: int, purpose: str) -> tuple[int, int]:
    """The two 64-bit words of the Philox key: the seed modulo 2^64 and a hash of the purpose that never changes."""
    return seed & _WORD, int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")


def words(seed: int, purpose: str, position: Ints, count: int) -> UInts:
    """`count` random 64-bit words for each position, uint64 [n, count]."""
    return draw_words(seed, {purpose: count}, position)[purpose]


def uniform(seed: int, purpose: str, position: Ints, count: int) -> Floats:
    """Numbers in [0, 1) with 53 random bits, float64 [n, count]."""
    return _to_unit(words(seed, purpose, position, count))


def normal(seed: int, purpose: str, position: Ints, count: int) -> Floats:
    """Standard normal numbers by Box and Muller's transform of `uniform`, float64 [n, count]."""
    return to_normal(uniform(seed, purpose, position, count + count % 2))[:, :count]


def draw(seed: int, counts: Mapping[str, int], position: Ints) -> dict[str, Floats]:
    """`uniform` for many purposes at once (purpose -> how many): the same numbers, one pass of the cipher."""
    return {purpose: _to_unit(raw) for purpose, raw in draw_words(seed, counts, position).items()}


def draw_words(seed: int, counts: Mapping[str, int], position: Ints) -> dict[str, UInts]:
    """`words` for many purposes at once: purpose -> uint64 [n, count]."""
    place = np.asarray(position, dtype=np.int64).astype(np.uint64)
    blocks = [-(-count // 4) for count in counts.values()]
    keys = [key(seed, purpose)[1] for purpose in counts]
    # numpy's generator steps its counter before it encrypts, hence blocks from 1
    block = np.concatenate([np.arange(1, size + 1, dtype=np.uint64) for size in blocks] or [np.empty(0, np.uint64)])
    second = np.repeat(np.array(keys, dtype=np.uint64), blocks)
    raw = _philox(block[None, :], place[:, None], seed & _WORD, second[None, :])  # [n, all blocks, 4]
    ends = np.cumsum(blocks)
    return {
        purpose: raw[:, end - size : end].reshape(len(place), 4 * size)[:, :count]
        for (purpose, count), size, end in zip(counts.items(), blocks, ends, strict=True)
    }


def to_normal(unit: Floats) -> Floats:
    """An even number of uniform columns -> as many standard normal ones: each pair gives a cosine and a sine."""
    radius = np.sqrt(-2.0 * np.log1p(-unit[:, 0::2]))
    angle = 2.0 * np.pi * unit[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(unit.shape)


def _to_unit(raw: UInts) -> Floats:
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _philox(block: UInts, place: UInts, seed: int, second: UInts) -> UInts:
    """Philox4x64-10 of the counters (block, place, 0, 0) under the keys (seed, second), broadcast; [..., 4]."""
    shape = np.broadcast_shapes(block.shape, place.shape, second.shape)
    c0, c1 = np.broadcast_to(block, shape), np.broadcast_to(place, shape)
    c2: UInts = np.zeros(shape, dtype=np.uint64)
    c3 = c2
    first = seed
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        high1 ^= c1
        high1 ^= np.uint64(first)
        high0 ^= c3
        high0 ^= second
        c0, c1, c2, c3 = high1, low1, high0, low0
        first = (first + _WEYL[0]) & _WORD
        second = second + np.uint64(_WEYL[1])
    return np.stack([c0, c1, c2, c3], axis=-1)


def _multiply(value: UInts, constant: int) -> tuple[UInts, UInts]:
    """The high and the low word of a 64 x 64 bit product, from four 32-bit ones."""
    high, low = np.uint64(constant >> 32), np.uint64(constant & 0xFFFFFFFF)
    value_high, value_low = value >> _HALF, value & _LOW
    carry = value_low * low
    carry >>= _HALF
    carry += value_high * low
    middle = value_low * high
    middle += carry & _LOW
    middle >>= _HALF
    carry >>= _HALF
    value_high *= high
    value_high += carry
    value_high += middle
    return value_high, value * np.uint64(constant)
