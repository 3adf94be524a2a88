"""What happens to a step whose loss or gradients are not finite, on whichever rank.

    the first time      nothing was changed; back to the last checkpoint, and through the same batches again
    the same step again skipped: weights, optimizer, centres and teacher stay, the stream goes on
    more than 3 skips within 1 000 steps: the run ends with a clear error, resumable

The batch is kept for inspection below `faults/`, the decisions in `faults/steps.jsonl`, which outlives the process.
All ranks see the same loss and norms, so they decide alike without asking one another.
"""

import io
import json
from typing import Any

import numpy as np

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError
from datapipe.stream.batch import Batch
from training.core.host import run_lines
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.stepper import Result
from training.methods.base import TrainingProgress

MOST_SKIPS, WINDOW_STEPS = 3, 1_000
RECORD = "faults/steps.jsonl"


class Rewind(Exception):
    """Back to the last checkpoint. Raised on every rank in the same step; never leaves `pretrain`."""


def _record(line: str) -> dict[str, Any] | None:
    """What a line says of a step; None for what is no such line."""
    try:
        record = parse_record(line)
    except ValueError:
        return None
    return record if isinstance(record.get("step"), int) else None


class Faults:
    """Remembers which steps failed, over restarts too. Made and called on every rank."""

    def __init__(self, folder: RunFolder, world: World) -> None:
        self.folder, self.world = folder, world
        lines = world.broadcast((folder.read_text(RECORD) or "").splitlines() if world.is_leader else None)
        records = [record for line in lines if (record := _record(line)) is not None]
        if len(records) < len(lines):
            run_lines.warning(f"{len(lines) - len(records)} lines of {RECORD} are damaged and are passed over")
        self._failed = {record["step"] for record in records}
        self._skipped = {record["step"] for record in records if record.get("action") == "skipped"}

    def handle(self, progress: TrainingProgress, batch: Batch, result: Result, names: list[str]) -> None:
        """Raise Rewind, or return when the step is to be skipped. Raises DataError when too many were."""
        step = progress.step + 1
        self._keep(step, batch)
        again = step in self._failed
        self._failed.add(step)
        what = describe(result, names)
        if not again:
            self._note(step, "rewound", what)
            run_lines.warning(f"step {step}: {what}; nothing was changed, going back to the last checkpoint")
            raise Rewind
        self._skipped.add(step)
        self._note(step, "skipped", what)
        recent = sorted(past for past in self._skipped if step - WINDOW_STEPS < past <= step)
        if len(recent) > MOST_SKIPS:
            steps, kept = ", ".join(map(str, recent)), self.folder.store.address("faults")
            raise DataError(
                f"{len(recent)} of the last {WINDOW_STEPS:,} steps had to be skipped: {what}",
                where=f"steps {steps}; their batches lie in {kept}",
                hint="a lower optimisation.lr, optimisation.precision fp32, or another seed; the last checkpoint stays",
            )
        run_lines.warning(f"step {step}: {what}, again; the step is skipped ({len(recent)} of {MOST_SKIPS} allowed)")

    def _keep(self, step: int, batch: Batch) -> None:
        """The rank's part of the batch, as it went into the step."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"views/{name}": pixels for name, pixels in batch.views.items()}
        np.savez_compressed(buffer, sample=batch.sample, position=batch.position, weight=batch.weight, **arrays)
        self.folder.write(f"faults/step_{step:07d}_rank_{self.world.rank:02d}.npz", buffer.getvalue())

    def _note(self, step: int, action: str, what: str) -> None:
        if self.world.is_leader:
            self.folder.append(RECORD, json.dumps({"step": step, "action": action, "what": what}))
            self.folder.flush()


def describe(result: Result, names: list[str]) -> str:
    """What is not finite: the loss, or gradients by name."""
    worst = [name for name, norm in zip(names, result.norms.tolist(), strict=True) if norm - norm != 0]
    listed = ", ".join(worst[:3]) + (f" and {len(worst) - 3} more" if len(worst) > 3 else "")
    return f"the loss is {result.loss}" + (f", gradients are not finite in {listed}" if worst else "")
