"""What all ranks agree on with every step, by one small all-reduce: whether to stop, and how far a checkpoint is."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from training.checkpoint import Checkpoints, Report
from training.engine.host import Host
from training.engine.world import World


class _Question(NamedTuple):
    """What was asked in the step before."""

    told: torch.Tensor
    """[1 + fields of Report]: ranks that were told to stop, and the sum of their reports."""
    work: dist.Work
    stage: tuple[int, bool] | None
    """Of the checkpoints, when it was asked."""


class Stop:
    """Agreement on stopping, though only one rank may have heard the signal, one step late, so that nobody waits for
    the answer. The same answer tells `checkpoints` how far the others are."""

    def __init__(self, host: Host, world: World, checkpoints: Checkpoints | None = None) -> None:
        self._host, self._world, self._checkpoints = host, world, checkpoints
        self._asked: _Question | None = None
        self.reached = False
        """Was it agreed to stop? Equal on all ranks."""

    def agreed(self) -> bool:
        """Call once per step on every rank: True on all of them in the same step.

        With several ranks the answer is to the question asked one step earlier.
        """
        self.reached = self._agree()
        return self.reached

    def _agree(self) -> bool:
        if self._world.size == 1:
            return self._heard(self._words(), self._stage)
        stop = self._answer()
        told = self._words().to(self._world.device)
        self._asked = _Question(told, dist.all_reduce(told, async_op=True), self._stage)
        return stop

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        self._asked.work.wait()
        return self._heard(self._asked.told, self._asked.stage)

    def _words(self) -> torch.Tensor:
        """What this rank has to say."""
        report = Report() if self._checkpoints is None else self._checkpoints.report()
        return torch.tensor([float(self._host.preempted()), *report])

    def _heard(self, told: torch.Tensor, stage: tuple[int, bool] | None) -> bool:
        stop, *report = told.tolist()
        if self._checkpoints is not None and stage == self._checkpoints.stage:
            self._checkpoints.hear(Report(*report))
        return bool(stop)

    @property
    def _stage(self) -> tuple[int, bool] | None:
        return None if self._checkpoints is None else self._checkpoints.stage
