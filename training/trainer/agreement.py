"""What all ranks agree on with every step: whether to stop, and how far a checkpoint is."""

from training.checkpoint import Checkpoints, Report
from training.core.exchange import Exchange
from training.core.host import Host


class Stop:
    """Agreement on stopping, though only one rank may have heard the signal. The same answer tells `checkpoints` how
    far the others are."""

    def __init__(self, host: Host, exchange: Exchange, checkpoints: Checkpoints | None = None) -> None:
        self._host, self._checkpoints = host, checkpoints
        self._stage: tuple[int, bool] | None = None
        """Of the checkpoints, when the others were told."""
        self.reached = False
        """Was it agreed to stop? Equal on all ranks after `Exchange.tell`; with several, of what was told a step
        before."""
        exchange.add_sum(self._tell, self._hear)

    def _tell(self) -> list[float]:
        """[1 + fields of Report]: whether this rank was told to stop, and its report."""
        report, self._stage = Report(), None
        if self._checkpoints is not None:
            report, self._stage = self._checkpoints.report(), self._checkpoints.stage
        return [float(self._host.preempted()), *report]

    def _hear(self, sums: list[float]) -> None:
        stop, *report = sums
        self.reached = bool(stop)
        if self._checkpoints is not None and self._stage == self._checkpoints.stage:
            self._checkpoints.hear(Report(*report))
