"""What all ranks agree on with every step: whether to stop, and how far a checkpoint is."""

from training.checkpoint import Checkpoints, SaveStatus
from training.core.exchange import Exchange
from training.core.host import Host


class Stop:
    """Agreement on stopping, though only one rank may have heard the signal. The same answer tells `checkpoints` how
    far the others are."""

    def __init__(self, host: Host, exchange: Exchange, checkpoints: Checkpoints | None = None) -> None:
        self._host, self._checkpoints = host, checkpoints
        self._stage: tuple[int, bool] | None = None
        """Of the checkpoints, when their status was sent."""
        self.reached = False
        """Was it agreed to stop? Equal on all ranks after `Exchange.send`; with several, of what was sent a step
        before."""
        exchange.add_sum(self._contribute, self._apply)

    def _contribute(self) -> list[float]:
        """[1 + fields of SaveStatus]: was this rank asked to stop, and how far its save is."""
        status, self._stage = SaveStatus(), None
        if self._checkpoints is not None:
            status, self._stage = self._checkpoints.local_status(), self._checkpoints.stage
        return [float(self._host.preempted()), *status]

    def _apply(self, sums: list[float]) -> None:
        stop, *status = sums
        self.reached = bool(stop)
        if self._checkpoints is not None and self._stage == self._checkpoints.stage:
            self._checkpoints.apply_global_status(SaveStatus(*status))
