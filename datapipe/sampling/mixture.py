"""Pure: (weights, position) -> which of several data sets, and which of its own places. Evenly interleaved.

The data sets stand at the leaves of a balanced tree. Each node deals its places to its two halves in the manner of
Beatty's sequences: after q places the first half has had round(q * share) of them, in integers. Every place is found
by itself, so a mix goes on from any position exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from datapipe.core.errors import ConfigError
from datapipe.core.randomness import Ints
from datapipe.sampling.epoch_order import SampleOrder

LARGEST_TOTAL = 2**31 - 1
"""Largest sum of the whole weights: squares of sums of weights must fit into 63 bits."""


def whole_weights(weights: Sequence[float], *, where: str = "") -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion, exactly as the decimals say (.7 is 7 / 10).

    Raises ConfigError for weights that are not positive, or that no numbers below 2^31 are in proportion to.
    """
    if any(not weight > 0 or math.isinf(weight) for weight in weights):
        raise ConfigError(
            f"weights of data sets must be positive: {list(weights)}",
            where=where,
            hint="leave out the data set that is not wanted",
        )
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [int(share * math.lcm(*(share.denominator for share in exact))) for share in exact]
    whole = tuple(part // math.gcd(*parts) for part in parts)
    if sum(whole) > LARGEST_TOTAL:
        raise ConfigError(
            f"the proportion of the weights {list(weights)} is too fine: {list(whole)}",
            where=where,
            hint="give rounder weights, such as 3 and 1",
        )
    return whole


@dataclass(frozen=True)
class Schedule:
    """The data set at each place of an endless mix, in proportion to whole weights.

    Among the first p places, and among any p from a multiple of the sum of the weights on, data set k has p * share of
    k to within half a place for each level of the tree: to within one for up to four data sets, 1.5 for up to eight.
    Each sum of the weights' places it has exactly its weight of them.
    """

    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 1 or sum(self.weights) > LARGEST_TOTAL:
            raise ValueError(f"Schedule: impossible weights {self.weights}")

    def places(self, positions: Ints) -> tuple[Ints, Ints]:
        """(data set, how many of its places came before) at these positions, int64 [n] each."""
        return self._deal(range(len(self.weights)), np.asarray(positions, dtype=np.int64))

    def _deal(self, sets: range, places: Ints) -> tuple[Ints, Ints]:
        """Places of the node above these data sets -> (data set, its own place)."""
        if len(sets) == 1:
            return np.full_like(places, sets[0]), places
        half = (len(sets) + 1) // 2
        of_first, whole = self._weight(sets[:half]), self._weight(sets)
        before = _rounded_share(places, of_first, whole)
        goes_first = _rounded_share(places + 1, of_first, whole) > before
        chosen, own = np.empty_like(places), np.empty_like(places)
        chosen[goes_first], own[goes_first] = self._deal(sets[:half], before[goes_first])
        chosen[~goes_first], own[~goes_first] = self._deal(sets[half:], (places - before)[~goes_first])
        return chosen, own

    def _weight(self, sets: range) -> int:
        return sum(self.weights[number] for number in sets)


@dataclass(frozen=True)
class MixedOrder:
    """The sample at each place of several data sets' mix, each in the epochs of its own order.

    Sample ids count through the data sets: row r of data set k is the rows of all before k, plus r. Weighted by their
    rows, the data sets make a plain union: every `rows` places hold every sample exactly once.
    """

    orders: tuple[SampleOrder, ...]
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.orders) != len(self.weights):
            raise ValueError(f"MixedOrder: {len(self.orders)} orders and {len(self.weights)} weights")

    @property
    def rows(self) -> int:
        """Sample ids, over all data sets."""
        return sum(order.rows for order in self.orders)

    @property
    def firsts(self) -> list[int]:
        """The first sample id of each data set."""
        return list(accumulate((order.rows for order in self.orders), initial=0))[:-1]

    @property
    def together(self) -> int:
        return 1

    def samples(self, positions: Ints) -> Ints:
        """The sample ids at these places of the stream, int64 [n]."""
        chosen, own = Schedule(self.weights).places(positions)
        samples = np.empty_like(own)
        for number, (order, first) in enumerate(zip(self.orders, self.firsts, strict=True)):
            mine = chosen == number
            samples[mine] = first + order.samples(own[mine])
        return samples

    def turns(self, positions: Ints) -> Ints:
        """Turns of each place within its own data set: they rise among the places of one data set."""
        chosen, own = Schedule(self.weights).places(positions)
        turns = np.empty_like(own)
        for number, order in enumerate(self.orders):
            mine = chosen == number
            turns[mine] = order.turns(own[mine])
        return turns

    def blocks(self, samples: Ints) -> Ints:
        """The number of the block that holds each sample; no two data sets have one in common."""
        chosen = np.searchsorted(self.firsts, samples, side="right") - 1
        blocks = np.empty_like(samples)
        before = 0
        for number, (order, first) in enumerate(zip(self.orders, self.firsts, strict=True)):
            mine = chosen == number
            blocks[mine] = before + order.blocks(samples[mine] - first)
            before += int(order.blocks(np.array([order.rows - 1]))[0]) + 1
        return blocks


def _rounded_share(places: Ints, part: int, whole: int) -> Ints:
    """places * part / whole, rounded to the nearest integer, halves up; exact for any int64 and whole < 2^31."""
    rounds, rest = np.divmod(places, whole)
    return rounds * part + (2 * rest * part + whole) // (2 * whole)
