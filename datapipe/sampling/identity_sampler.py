"""Pure: (labels, seed, position) -> which sample, for batches of P identities with K instances each.

What the published fine-tuning recipes' RandomIdentitySampler does for one epoch in one process, as an order: any
position is found by itself, so it resumes exactly and in any world.
"""

from dataclasses import dataclass

import numpy as np

from datapipe.core.errors import DataError
from datapipe.core.randomness import Ints, UInts, words
from datapipe.sampling.epoch_order import KEY_WORDS, encrypt

IDENTITY_ORDER_VERSION = 1
"""Part of every key; raised whenever the same arguments would give another order."""


def numbered(pids: Ints, *, fraction: float = 1.0, seed: int = 0) -> Ints:
    """Identities as 0, 1, 2 ... in ascending order; -1 for negative ones and for those that take no part.

    `fraction` of the identities, rounded, at least one, are drawn by the seed: those of a smaller fraction are among
    those of a larger one.
    """
    known = np.unique(pids[pids >= 0])
    count = max(1, round(fraction * len(known)))
    drawn = np.argsort(words(seed, "identities/fraction", known, 1)[:, 0], kind="stable")[:count]
    taken = known[np.sort(drawn)]
    place = np.searchsorted(taken, pids).clip(max=max(len(taken) - 1, 0))
    return np.where(taken[place] == pids, place, -1) if len(taken) else np.full(len(pids), -1)


@dataclass(frozen=True)
class Deal:
    """Hands of `hand` different cards out of `cards`, without end, all cards used evenly. Whole arrays at once.

    A round is as many hands as the cards suffice for. The cards % hand that are left over rest, other ones in each
    round, one after the other in the order of the cards: after any round, all have been used equally often to within
    one. Needs cards >= hand; both int64 [n] or [1].
    """

    cards: Ints
    hand: int

    @property
    def per_round(self) -> Ints:
        """Cards that a round uses."""
        return self.cards - self._resting

    @property
    def _resting(self) -> Ints:
        return self.cards % self.hand

    def card(self, turn: Ints, place: Ints, keys: UInts) -> Ints:
        """The card at a place (from 0, below `per_round`) of a round, shuffled by the round's keys."""
        shuffled = encrypt(place, self.per_round, keys)
        return (turn * self._resting + self._resting + shuffled) % self.cards

    def uses_before(self, turn: Ints, card: Ints) -> Ints:
        """Rounds before this one that used the card."""
        rested = (turn * self._resting + self.cards - 1 - card) // self.cards
        return turn - rested


class IdentityOrder:
    """Batches of `identities` different identities with `instances` images each, side by side; positions from 0.

    Rows whose label is negative (junk or unknown) never appear. A round of identities gives each of them one
    turn, but for the few that do not fill a batch: these rest, other ones every round, so that all come equally often
    to within one. An identity's images are used in the same way over its turns: all equally often to within one, `K`
    different ones in each turn; an identity with fewer images repeats them within a turn, as few times as possible.

    Holds the rows sorted by identity; nothing is made for an epoch. Raises DataError for fewer than P identities.
    """

    def __init__(self, labels: Ints, *, seed: int, identities: int, instances: int) -> None:
        if min(identities, instances) < 1:
            raise ValueError(f"impossible: {identities} identities with {instances} instances")
        self.seed, self.identities, self.instances, self.rows = seed, identities, instances, len(labels)
        order = np.argsort(labels, kind="stable")
        self._rows = order[np.searchsorted(labels, 0, sorter=order) :]
        sorted_labels = labels[self._rows]
        starts = np.flatnonzero(np.diff(sorted_labels, prepend=-1))
        self._first, self._images = starts, np.diff(starts, append=len(sorted_labels))
        if len(starts) < identities:
            raise DataError(
                f"batches of {identities} identities need as many; the data set has {len(starts)}",
                hint="fewer identities per batch, or a data set with labels: `python -m datapipe stats`",
            )

    @property
    def batch(self) -> int:
        """Images of a global batch: P * K."""
        return self.identities * self.instances

    @property
    def together(self) -> int:
        """Neighbours of one identity, which one rank should get."""
        return self.instances

    @property
    def epoch(self) -> int:
        """Positions of one round of the identities."""
        return int(self._identity_deal.per_round[0]) * self.instances

    @property
    def _identity_deal(self) -> Deal:
        return Deal(np.array([len(self._first)]), self.identities)

    def samples(self, positions: Ints) -> Ints:
        """The sample ids at these places of the stream (from 0), int64 [n]."""
        turns, instance = np.divmod(np.asarray(positions, dtype=np.int64), self.instances)
        seen, which = np.unique(turns, return_inverse=True)
        identity, visit = self._identities(seen)
        image = self._image(identity[which], visit[which], instance)
        return self._rows[self._first[identity[which]] + image]

    def blocks(self, samples: Ints) -> Ints:
        """Each sample by itself: those of an identity lie anywhere, and are read one by one."""
        return samples

    def turns(self, positions: Ints) -> Ints:
        """All 0: a sample may come again at any time."""
        return np.zeros(len(positions), dtype=np.int64)

    def _identities(self, turns: Ints) -> tuple[Ints, Ints]:
        """Whose turn it is, and how many turns each had before."""
        deal = self._identity_deal
        rounds, place = np.divmod(turns, deal.per_round)
        seen, which = np.unique(rounds, return_inverse=True)
        keys = words(self.seed, f"identities/{IDENTITY_ORDER_VERSION}/turns", seen, KEY_WORDS)
        identity = deal.card(rounds, place, keys[which])
        return identity, deal.uses_before(rounds, identity)

    def _image(self, identity: Ints, visit: Ints, instance: Ints) -> Ints:
        """Which of its images an identity shows at an instance (0 .. K - 1) of a visit."""
        image = np.empty_like(identity)
        few = self._images[identity] < self.instances
        image[few] = (visit[few] * self.instances + instance[few]) % self._images[identity[few]]
        image[~few] = self._drawn_image(identity[~few], visit[~few], instance[~few])
        return image

    def _drawn_image(self, identity: Ints, visit: Ints, instance: Ints) -> Ints:
        """Which of its images an identity shows, where it has images enough for a whole turn."""
        deal = Deal(self._images[identity], self.instances)
        rounds, place = np.divmod(visit * self.instances + instance, deal.per_round)
        seen, which = np.unique(identity << 32 | rounds, return_inverse=True)  # a key for each pair
        keys = words(self.seed, f"identities/{IDENTITY_ORDER_VERSION}/images", seen, KEY_WORDS)
        return deal.card(rounds, place, keys[which])
