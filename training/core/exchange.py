"""What ranks tell each other once a step without waiting: told in one step, heard in the next."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.core.world import World

Numbers = Sequence[float]


class _Participant(NamedTuple):
    """Who tells something, and what becomes of it."""

    tell: Callable[[], Numbers | None]
    hear: Callable[[list[list[float]]], None]
    """Given the rows of all ranks, or one row, their sum."""
    by_rank: bool


class _Told(NamedTuple):
    """An all-reduce that is under way, and whose numbers lie where in it."""

    values: torch.Tensor
    shares: list[tuple[_Participant, int]]
    """Each with the length of a row."""
    work: dist.Work | None


class Exchange:
    """One all-reduce of a small float64 tensor a step, for everybody who has something to tell.

    Every rank has the same participants, added in the same order, and calls `hear` and `tell` in the same steps: `hear`
    once the step is done, `tell` at its very end. With one rank what is told is heard at once, by `tell`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._participants: list[_Participant] = []
        self._told: _Told | None = None

    @property
    def alone(self) -> bool:
        """Is there one rank only?"""
        return self._world.size == 1

    def add_sum(self, tell: Callable[[], Numbers], hear: Callable[[list[float]], None]) -> None:
        """A participant that hears the sum over the ranks of what each told."""
        self._participants.append(_Participant(tell, lambda rows: hear(rows[0]), by_rank=False))

    def add_rows(self, tell: Callable[[], Numbers | None], hear: Callable[[list[list[float]]], None]) -> None:
        """A participant that hears what each rank told, rank by rank. `tell` gives None where there is nothing to tell,
        on all ranks alike; then nothing is heard of it."""
        self._participants.append(_Participant(tell, hear, by_rank=True))

    def hear(self) -> None:
        """What was told last is heard, once. Returns at once where the others have come as far."""
        if self._told is None:
            return
        pending, self._told = self._told, None
        if pending.work is not None:
            pending.work.wait()
        numbers = pending.values.tolist()
        for participant, length in pending.shares:
            count = self._world.size if participant.by_rank else 1
            rows = [numbers[row * length : (row + 1) * length] for row in range(count)]
            numbers = numbers[count * length :]
            participant.hear(rows)

    def tell(self) -> None:
        """Begin to tell what the participants have to tell now."""
        flat: list[float] = []
        shares = []
        for participant in self._participants:
            if (row := participant.tell()) is None:
                continue
            shares.append((participant, len(row)))
            table = [[0.0] * len(row)] * (self._world.size if participant.by_rank else 1)
            table[self._world.rank if participant.by_rank else 0] = [float(value) for value in row]
            flat += itertools.chain(*table)
        values = torch.tensor(flat, dtype=torch.float64, device=self._world.device)
        self._told = _Told(values, shares, None if self.alone else dist.all_reduce(values, async_op=True))
        if self.alone:
            self.hear()
