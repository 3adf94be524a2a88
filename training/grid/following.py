"""New checkpoints of runs that are under way, for a grid that follows them."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from datapipe.core.config import StorageConfig
from datapipe.storage import full_url
from training import checkpoint
from training.config.run_plan import steps_of
from training.core.run_folder.lease import last_renewal
from training.core.run_folder.run_folder import RunFolder
from training.grid.cells import Cell
from training.grid.planning import LeftOut, Planner, WeightsList

EVERY_S = 5.0
"""Seconds between looks for new checkpoints."""


SILENT_S, RESTART_S = 30.0, 600.0
"""Seconds without a sign of life after which a run is followed no more: one that nobody was seen to write to, and one
that may be started again."""


class _Sign(NamedTuple):
    """The last sign of life of a run."""

    renewal: bytes
    since: float
    """When it was first seen, by `time.monotonic`."""
    alive: bool
    """Has it ever changed?"""


class Following:
    """Cells of checkpoints as they appear."""

    def __init__(
        self, planner: Planner, weights: WeightsList, addresses: Iterable[str], storage: StorageConfig,
        show_line: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """`addresses`: of run folders."""
        self._planner, self._weights, self._storage, self._show_line = planner, weights, storage, show_line
        self._runs = {full_url(address) for address in addresses}
        self._seen: set[str] = set()
        self._signs: dict[str, _Sign] = {}
        self._looked_at = 0.0

    def arrivals(self) -> tuple[list[Cell], list[LeftOut]]:
        """Cells of weights that are there since the last call; of all in the first one."""
        self._looked_at = time.monotonic()
        cells: list[Cell] = []
        left_out: list[LeftOut] = []
        for weights in self._weights.all():
            if weights.name not in self._seen:
                self._seen.add(weights.name)
                ours, without = self._planner.cells(weights)
                cells += ours
                left_out += without
        return cells, left_out

    @property
    def due(self) -> bool:
        """Is it time for another look?"""
        return bool(self._runs) and time.monotonic() - self._looked_at >= EVERY_S

    def over(self) -> bool:
        """Will no more checkpoints come: are all runs complete, or does nobody write to them? Look for arrivals once
        more afterwards."""
        for run in sorted(self._runs):
            folder = RunFolder(run, self._storage)
            names = checkpoint.complete(folder.at("checkpoints"))
            step, steps = checkpoint.step_of(names[-1]) or 0 if names else 0, steps_of(folder)
            if steps and step >= steps:
                self._show_line(f"{run} is complete: it has no further checkpoints")
                self._runs.discard(run)
            elif self._silent(run):
                self._show_line(f"nobody trains in {run}, at step {step:,} of {steps:,}: it is followed no more; the "
                                "same command goes on with it")  # fmt: skip
                self._runs.discard(run)
        return not self._runs

    def _silent(self, run: str) -> bool:
        """Has nobody written to the run for so long that none is expected?"""
        renewal, now = last_renewal(run, self._storage), time.monotonic()
        before = self._signs.get(run)
        if before is None or renewal != before.renewal:
            alive = before is not None and (before.alive or bool(renewal))
            self._signs[run] = before = _Sign(renewal, now, alive)
        return now - before.since >= (RESTART_S if before.alive else SILENT_S)
