"""One asynchronous all-reduce a step for small numbers: sent in one step, received in the next; no rank waits."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.core.collectives import all_reduce_later
from training.core.world import World

Numbers = Sequence[float]


class _Participant(NamedTuple):
    """Who contributes numbers, and what takes the result."""

    contribute: Callable[[], Numbers | None]
    apply: Callable[[list[list[float]]], None]
    """Given the rows of all ranks, or one row, their sum."""
    by_rank: bool


class _Pending(NamedTuple):
    """An all-reduce that is under way, and which numbers in it are whose."""

    values: torch.Tensor
    shares: list[tuple[_Participant, int]]
    """Each participant with the length of its row."""
    work: dist.Work | None


class Exchange:
    """One all-reduce of a small float64 tensor a step, shared by all that exchange numbers among ranks.

    Every rank has the same participants, added in the same order, and calls `receive` and `send` in the same steps:
    `receive` once the step is done, `send` at its very end. With one rank `send` receives at once.
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
        self._participants.append(_Participant(contribute, lambda rows: apply(rows[0]), by_rank=False))

    def add_rows(self, contribute: Callable[[], Numbers | None], apply: Callable[[list[list[float]]], None]) -> None:
        """Add a participant: `apply` gets one row a rank. Where `contribute` returns None, on all ranks alike, nothing
        is exchanged and `apply` is not called."""
        self._participants.append(_Participant(contribute, apply, by_rank=True))

    def receive(self) -> None:
        """Hand the last all-reduce's result to the participants, once. Waits only for ranks that lag a step behind."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.work is not None:
            pending.work.wait()
        numbers = pending.values.tolist()
        for participant, length in pending.shares:
            count = self._world.size if participant.by_rank else 1
            rows = [numbers[row * length : (row + 1) * length] for row in range(count)]
            numbers = numbers[count * length :]
            participant.apply(rows)

    def send(self) -> None:
        """Start the all-reduce of what the participants contribute now."""
        flat: list[float] = []
        shares = []
        for participant in self._participants:
            if (row := participant.contribute()) is None:
                continue
            shares.append((participant, len(row)))
            table = [[0.0] * len(row)] * (self._world.size if participant.by_rank else 1)
            table[self._world.rank if participant.by_rank else 0] = [float(value) for value in row]
            flat += itertools.chain(*table)
        values = torch.tensor(flat, dtype=torch.float64, device=self._world.device)
        self._pending = _Pending(values, shares, all_reduce_later(values))
        if self.alone:
            self.receive()
