"""What a run records: one JSON line per step and attempt, a status line now and then, TensorBoard as a view.

The names of what every method records are explained in `training/nn/feature_diagnostics.py`, those of a method's own
where it makes them. A step on which signs of collapse stand (`training/trainer/monitoring/collapse.py`) lists them
under "signs"; the log tells when one appears or goes.
Floats are written so that they read back exactly. Readers keep the last record of a step over all attempts.
"""

import json
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from datapipe.core.progress import duration
from training.checkpoint import Saved
from training.core.host import lines_to, run_lines
from training.core.run_folder.run_folder import RunFolder
from training.methods.base import TrainingProgress
from training.trainer.monitoring.collapse import CollapseMonitor
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.monitoring.pauses import Pauses
from training.trainer.monitoring.tensorboard import EventWriter
from training.trainer.monitoring.throughput import Rates, Speed, in_words
from training.trainer.monitoring.utilisation import Yardstick

STATUS_S = 5.0
"""Seconds between status lines."""
_ATTEMPT = re.compile(r"metrics/attempt_(\d+)\.jsonl")


class Recorder(Observer):
    """Writes the metrics of one attempt. Made on the leading rank only."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        about: Mapping[str, Any],
        total_steps: int,
        measure: Yardstick | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        """`about` goes into the attempt's first line: world, resumed_from, step, reason, and when which stage of the
        start was over (`Startup`). `total_steps`: of the whole run. `measure`: what rates come to; `pauses`: what the
        time left includes beside steps."""
        self.folder, self._about, self._total_steps = folder, about, total_steps
        self.measure, self.pauses = measure, pauses
        self.speed = Speed()
        self.course = CollapseMonitor()
        self._spoke = 0.0

    def begin(self) -> None:
        folder = self.folder
        self.attempt = 1 + max((int(match[1]) for match in map(_ATTEMPT.fullmatch, folder.names("metrics/")) if match),
                               default=0)  # fmt: skip
        self.name = f"metrics/attempt_{self.attempt:03d}.jsonl"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        folder.begin(self.name, json.dumps({"attempt": self.attempt, "time": now, **self._about}))
        self._board = EventWriter(folder, total_steps=self._total_steps)
        self.speed.pause()

    def step(self, step: StepDone) -> None:
        progress, now, batch, result, spent = step
        images = batch.after - batch.start
        rates = self.speed.step(images, spent)
        line: dict[str, Any] = {
            "step": progress.step + 1,
            "samples": progress.samples + images,
            "epoch": (progress.step + 1) / progress.epoch_steps,
            "done": (progress.step + 1) / progress.total_steps,
            "loss": result.loss,
            **result.metrics,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.ema,
            "grad_norm": float(result.norms.square().sum().sqrt()),
            **{name: value for name, value in rates._asdict().items() if value is not None},
            **(self.measure.of(rates.images_per_s) if self.measure else {}),
            "bytes_fetched": int(spent.intake.fetched),
            "replaced_samples": int(spent.intake.replaced),
            "bottleneck": rates.bottleneck,
            "time": time.time(),
        }
        for change in self.course.see(line):
            run_lines.info(f"step {line['step']:,}: {change}")
        standing = {"signs": sorted(self.course.standing)} if self.course.standing else {}
        self.folder.append(self.name, json.dumps(line | standing))
        self._board.step(line)
        last = progress.step + 1 == progress.total_steps
        if last or time.monotonic() - self._spoke > STATUS_S:
            self._spoke = time.monotonic()
            run_lines.info(self._status(progress, line, images, rates))

    def saved(self, checkpoint: Saved) -> None:
        """A line of its own, without a "step"."""
        self.folder.append(self.name, json.dumps({
            "checkpoint": checkpoint.step, "save_stood_s": checkpoint.stood_s, "save_took_s": checkpoint.took_s,
            "save_share": checkpoint.share, "time": time.time(),
        }))  # fmt: skip

        self._board.add("checkpoint/stood_s", checkpoint.stood_s, checkpoint.step)
        self._board.add("checkpoint/took_s", checkpoint.took_s, checkpoint.step)

    def scored(self, step: int, where: str, scores: Mapping[str, float]) -> None:
        for name in ("mAP", "rank1"):
            self._board.add(f"score/{where} {name}", scores[name], step)
        self.speed.pause("scores")

    def paused(self) -> None:
        self.speed.pause("saves")

    def labelled(self) -> None:
        self.speed.pause("labels")

    def began_anew(self) -> None:
        self.speed.begin_anew()

    def close(self) -> None:
        """Write what is buffered."""
        self._board.close()
        self.folder.flush()

    def _status(self, progress: TrainingProgress, line: Mapping[str, float], images: int, rates: Rates) -> str:
        seconds = self._left_s(progress, images)
        end = f" ({datetime.fromtimestamp(time.time() + seconds):%a %H:%M})" if seconds == seconds else ""
        terms = " ".join(f"{key.removeprefix('loss_')} {line[key]:.3f}" for key in line if key.startswith("loss_"))
        return fitted(
            (f"step {progress.step + 1:,}/{progress.total_steps:,}", True),
            (f" {100 * line['step'] / progress.total_steps:.1f} %", False),
            (f"  loss {line['loss']:.4f}", True),
            (f" ({terms})" if terms else "", False),
            (f"  |g| {line['grad_norm']:.3g}", False),
            (f"  lr {line['lr']:.1e}", False),
            (f"  {in_words(rates)}", True),
            (f"  MFU {100 * line['mfu']:.0f} %" if "mfu" in line else "", True),
            (f"  left {duration(seconds)}", True),
            (end, False),
        )

    def _left_s(self, progress: TrainingProgress, images: int) -> float:
        """Seconds to the end: training at the present rate, and what it pauses for."""
        training_s = self.speed.training_s((progress.total_steps - progress.step - 1) * images)
        left = self.pauses.left(progress.step + 1, training_s) if self.pauses else {}
        return training_s + self.speed.pauses_s(left)


COLUMNS = 100
"""Widest training line on a terminal, characters."""
LEGEND = (
    "in the lines below: loss and its terms, |g| norm of the gradient before clipping, lr learning rate,",
    "  img/s images a second of all ranks, wait for data: time and for what, left: time to the end,",
    "  saves and scores included",
)
"""Abbreviations of the status line."""


def fitted(*pieces: tuple[str, bool]) -> str:
    """Pieces in their order: those that must be there, and of the others, first ones first, what fits into COLUMNS."""
    taken = {place for place, (_, must) in enumerate(pieces) if must}
    room = COLUMNS - sum(len(pieces[place][0]) for place in taken)
    for place, (piece, must) in enumerate(pieces):
        if not must and len(piece) <= room:
            taken.add(place)
            room -= len(piece)
    return "".join(piece for place, (piece, _) in enumerate(pieces) if place in taken)


def log_file(folder: RunFolder) -> AbstractContextManager[None]:
    """The run's lines are kept in log.txt, too, for as long as the context lasts."""
    return lines_to(lambda line: folder.append("log.txt", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}"))
