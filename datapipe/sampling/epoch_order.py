"""Pure: (rows, seed, position) -> which sample. A keyed permutation per epoch in constant memory.

Blocks of consecutive rows are permuted, the sequence of blocks is cut into windows, and the rows of each window are
permuted again: what is read from storage stays in blocks of megabytes, what a batch sees is mixed over a window.
The cipher is our own, on 64-bit integer arithmetic and Philox words only, so that no library release can change it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from datapipe.core.randomness import Ints, UInts, words

ORDER_VERSION = 1
"""Part of every key; raised whenever the same arguments would give another order. Checkpoints record it."""

KEY_WORDS = 8
"""Random words in a key of `encrypt`: one for each round of the cipher."""
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # the finaliser of splitmix64


class SampleOrder(Protocol):
    """Which sample is at each place of an endless stream: a pure function, so that any place is found by itself."""

    @property
    def rows(self) -> int:
        """Sample ids are 0 .. rows - 1."""

    @property
    def together(self) -> int:
        """Neighbours, from a multiple of so many on, that should go to one rank; 1: none."""

    def samples(self, positions: Ints) -> Ints:
        """The sample ids at these places (from 0, in any order), int64 [n]."""

    def blocks(self, samples: Ints) -> Ints:
        """The number of the block that each sample is read with, int64 [n]."""

    def turns(self, positions: Ints) -> Ints:
        """Numbers that rise along the stream, int64 [n]: each block that a stretch of one number needs is done with at
        its end, until a later epoch. All 0 where nothing can be said."""


@dataclass(frozen=True)
class Order:
    """The sample at each place of the endless stream: every epoch is another permutation of range(rows).

    `block` is the number of consecutive rows that move together, `window` the number of blocks whose rows are mixed.
    A short last block and a short last window are permuted like the others: nothing is dropped, repeated or pinned
    to the end of the epoch.
    """

    rows: int
    seed: int
    block: int
    window: int

    def __post_init__(self) -> None:
        for name in ("rows", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Order: {name} must be at least 1, not {getattr(self, name)}")

    @property
    def together(self) -> int:
        return 1

    def samples(self, positions: Ints) -> Ints:
        """The sample ids at these places of the stream (from 0, any order, any epoch), int64 [n]."""
        positions = np.asarray(positions, dtype=np.int64)
        samples = np.empty_like(positions)
        epochs = positions // self.rows
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            samples[mine] = self._in_epoch(int(epoch), positions[mine] - epoch * self.rows)
        return samples

    def blocks(self, samples: Ints) -> Ints:
        """The number of the block that holds each sample."""
        return samples // self.block

    def turns(self, positions: Ints) -> Ints:
        """The window that holds each place, numbered through all epochs."""
        epochs, place = np.divmod(np.asarray(positions, dtype=np.int64), self.rows)
        turns = np.empty_like(place)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            turns[mine] = epoch * self._windows + self._window_of(int(epoch), place[mine])
        return turns

    @property
    def _blocks(self) -> int:
        """Blocks of an epoch."""
        return -(-self.rows // self.block)

    @property
    def _windows(self) -> int:
        """Windows of an epoch."""
        return -(-self._blocks // self.window)

    @property
    def _missing(self) -> int:
        """Rows that the last block lacks."""
        return self._blocks * self.block - self.rows

    def _short(self, epoch: int) -> int:
        """The slot of the block that lacks rows; behind all slots where none does."""
        return _slot_of_last(self.seed, epoch, self._blocks) if self._missing else self._blocks

    def _in_epoch(self, epoch: int, place: Ints) -> Ints:
        missing, short = self._missing, self._short(epoch)
        keys = _block_keys(self.seed, epoch)
        place = self._mix_windows(epoch, place)
        # every block before the short one starts at a multiple of `block`, every later one `missing` rows earlier
        behind = place >= (short + 1) * self.block - missing
        slot, within = np.divmod(place + missing * behind, self.block)
        return encrypt(slot, np.array([self._blocks]), keys) * self.block + within

    def _mix_windows(self, epoch: int, place: Ints) -> Ints:
        """Permute the places of each window among themselves."""
        window = self._window_of(epoch, place)
        first, size = self._start(epoch, window), self._start(epoch, window + 1) - self._start(epoch, window)
        seen, which = np.unique(window, return_inverse=True)
        keys = _window_keys(self.seed, tuple((epoch * self._windows + seen).tolist()))[which]
        return first + encrypt(place - first, size, keys)

    def _window_of(self, epoch: int, place: Ints) -> Ints:
        """The window of the epoch that holds each place."""
        behind = place >= self._start(epoch, np.array([self._short(epoch) // self.window + 1]))
        return (place + self._missing * behind) // (self.window * self.block)

    def _start(self, epoch: int, window: Ints) -> Ints:
        """The first place of each window."""
        holds_short = self._short(epoch) // self.window
        whole = np.minimum(window * (self.window * self.block), self._blocks * self.block)
        return whole - self._missing * (window > holds_short)


# Remembered, because batch after batch asks for the same ones: half of the time of a small batch.


@lru_cache(maxsize=32)
def _block_keys(seed: int, epoch: int) -> UInts:
    """The key of the permutation of an epoch's blocks, [1, KEY_WORDS]."""
    return words(seed, f"order/{ORDER_VERSION}/blocks", np.array([epoch]), KEY_WORDS)


@lru_cache(maxsize=32)
def _window_keys(seed: int, windows: tuple[int, ...]) -> UInts:
    """The keys of the permutations within windows, numbered through all epochs, [n, KEY_WORDS]."""
    return words(seed, f"order/{ORDER_VERSION}/windows", np.array(windows), KEY_WORDS)


@lru_cache(maxsize=32)
def _slot_of_last(seed: int, epoch: int, blocks: int) -> int:
    """Where an epoch has the last block."""
    return int(_decrypt(np.array([blocks - 1]), np.array([blocks]), _block_keys(seed, epoch))[0])


def encrypt(value: Ints, size: Ints, keys: UInts) -> Ints:
    """A keyed bijection of range(size), per element; `keys` [n or 1, rounds], `size` [n or 1].

    A Feistel network over mixed radices: value = left * columns + right, left < rows, and rows * columns is at most
    sqrt(size) above `size`; what falls outside is encrypted again until it is inside (cycle walking).
    """
    return _walk(value, size, keys, forward=True)


def _decrypt(value: Ints, size: Ints, keys: UInts) -> Ints:
    """The inverse of `encrypt`."""
    return _walk(value, size, keys, forward=False)


def _walk(value: Ints, size: Ints, keys: UInts, *, forward: bool) -> Ints:
    size = np.broadcast_to(size, value.shape)
    keys = np.broadcast_to(keys, (len(value), KEY_WORDS))
    columns = _ceil_sqrt(size)
    result = _permute(value, columns, -(-size // columns), keys, forward)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        rows = -(-size[outside] // columns[outside])
        result[outside] = _permute(result[outside], columns[outside], rows, keys[outside], forward)
        outside = outside[result[outside] >= size[outside]]
    return result


def _permute(value: Ints, columns: Ints, rows: Ints, keys: UInts, forward: bool) -> Ints:
    """One pass of the network; both halves are moved by turns, modulo their own radix."""
    left, right = np.divmod(value, columns)
    for turn in range(KEY_WORDS) if forward else reversed(range(KEY_WORDS)):
        if turn % 2 == 0:
            left = _turn(left, scramble(right, keys[:, turn], rows), rows, forward)
        else:
            right = _turn(right, scramble(left, keys[:, turn], columns), columns, forward)
    return left * columns + right


def _turn(value: Ints, by: Ints, radix: Ints, forward: bool) -> Ints:
    """value + by or value - by modulo radix; both are in range(radix), so that no division is needed."""
    moved = value + by if forward else value - by + radix
    return moved - radix * (moved >= radix)


def scramble(value: Ints, key: UInts, radix: Ints) -> Ints:
    """A pseudo-random number in range(radix) for each value and key."""
    mixed = value.astype(np.uint64) + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= _FACTORS[0]
    mixed ^= mixed >> np.uint64(27)
    mixed *= _FACTORS[1]
    return ((mixed >> np.uint64(33)).astype(np.int64) * radix) >> 31  # 31 bits scaled to the radix, below 2^31


def _ceil_sqrt(size: Ints) -> Ints:
    """The smallest integer whose square reaches `size`, exact for any int64 (floats round above 2^52)."""
    root = np.sqrt(size.astype(np.float64)).astype(np.int64)
    root -= root * root >= size
    root += root * root < size
    root += root * root < size
    return np.maximum(root, 1)
