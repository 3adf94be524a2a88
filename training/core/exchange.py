"""One asynchronous all-reduce a step for small numbers: sent in one step, received in the next; no rank waits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.core.collectives import LateSum
from training.core.world import World

Numbers = Sequence[float]
Table = NDArray[np.float64]


class _Participant(NamedTuple):
    """Who contributes numbers, and what takes the result."""

    contribute: Callable[[], Numbers | None]
    apply: Callable[[Table], None]
    """Given [ranks, numbers], or [1, numbers], their sum."""
    by_rank: bool


class _Share(NamedTuple):
    """The part of an all-reduce that is one participant's: [first, end), in rows of equal length."""

    participant: _Participant
    first: int
    end: int
    rows: int


class _Pending(NamedTuple):
    """An all-reduce that is under way, and which numbers in it are whose."""

    sum: LateSum
    shares: list[_Share]


class Exchange:
    """One all-reduce of a small float64 tensor a step, shared by all that exchange numbers among ranks.

    Every rank has the same participants, added in the same order, and calls `receive` and `send` in the same steps:
    `receive` once the step is done, `send` at its very end. With one rank `send` receives at once. What it does in
    Python does not grow with the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._participants: list[_Participant] = []
        self._pending: _Pending | None = None

    @property
    def alone(self) -> bool:
        """Is there one rank only?"""
        return self._world.size == 1

    def add_sum(self, contribute: Callable[[], Numbers], apply: Callable[[list[float]], None]) -> None:
        """Add a participant: `apply` gets the element-wise sum over the ranks of what `contribute` returned on each."""
        self._participants.append(_Participant(contribute, lambda rows: apply(rows[0].tolist()), by_rank=False))

    def add_rows(self, contribute: Callable[[], Numbers | None], apply: Callable[[Table], None]) -> None:
        """Add a participant: `apply` gets [ranks, numbers], a row a rank. Where `contribute` returns None, on all ranks
        alike, nothing is exchanged and `apply` is not called."""
        self._participants.append(_Participant(contribute, apply, by_rank=True))

    def receive(self) -> None:
        """Hand the last all-reduce's result to the participants, once. Waits only for ranks that lag a step behind: not
        for what this rank's GPU computes."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        numbers = pending.sum.wait().numpy()
        for share in pending.shares:
            share.participant.apply(numbers[share.first : share.end].reshape(share.rows, -1))

    def send(self) -> None:
        """Start the all-reduce of what the participants contribute now."""
        contributed = []
        shares: list[_Share] = []
        end = 0
        for participant in self._participants:
            if (row := participant.contribute()) is None:
                continue
            rows = self._world.size if participant.by_rank else 1
            shares.append(_Share(participant, end, end := end + rows * len(row), rows))
            contributed.append(row)
        flat = np.zeros(end)
        for share, row in zip(shares, contributed, strict=True):
            table = flat[share.first : share.end].reshape(share.rows, -1)
            table[self._world.rank if share.participant.by_rank else 0] = row
        self._pending = _Pending(LateSum(torch.from_numpy(flat), self._world.device), shares)
        if self.alone:
            self.receive()
