"""What all ranks agree on with every step, by one small all-reduce: whether to stop, and how far a checkpoint is."""

import torch

from training.checkpoint import Checkpoints, Report
from training.core.host import Host
from training.core.late_reduce import LateReduce
from training.core.world import World


class Stop:
    """Agreement on stopping, though only one rank may have heard the signal, one step late, so that nobody waits for
    the answer. The same answer tells `checkpoints` how far the others are."""

    def __init__(self, host: Host, world: World, checkpoints: Checkpoints | None = None) -> None:
        self._host, self._world, self._checkpoints = host, world, checkpoints
        self._words = LateReduce(world)
        self._stage: tuple[int, bool] | None = None
        """Of the checkpoints, when the others were asked."""
        self.reached = False
        """Was it agreed to stop? Equal on all ranks."""

    def agreed(self) -> bool:
        """Call once per step on every rank: True on all of them in the same step.

        With several ranks the answer is to the question asked one step earlier.
        """
        alone = self._world.size == 1
        if alone:
            self._ask()
        self.reached = self._heard()
        if not alone:
            self._ask()
        return self.reached

    def _ask(self) -> None:
        """[1 + fields of Report]: ranks that were told to stop, and the sum of their reports."""
        report, self._stage = Report(), None
        if self._checkpoints is not None:
            report, self._stage = self._checkpoints.report(), self._checkpoints.stage
        self._words.ask(torch.tensor([float(self._host.preempted()), *report]))

    def _heard(self) -> bool:
        told = self._words.answer()
        if told is None:
            return False
        stop, *report = told.tolist()
        if self._checkpoints is not None and self._stage == self._checkpoints.stage:
            self._checkpoints.hear(Report(*report))
        return bool(stop)
