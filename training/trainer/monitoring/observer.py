"""Who follows a run step by step: what an observer is told, and when."""

from collections.abc import Mapping
from typing import NamedTuple

from datapipe.stream.batch import Batch
from training.checkpoint import Saved
from training.engine.param_groups import StepSettings
from training.engine.stepper import Result
from training.methods.base import TrainingProgress
from training.trainer.monitoring.throughput import SpentByRank


class StepDone(NamedTuple):
    """A step that counted."""

    progress: TrainingProgress
    """Before it."""
    settings: StepSettings
    batch: Batch
    result: Result
    spent: SpentByRank
    """What each rank's steps took so far; of nobody until the others have told."""

    @property
    def done(self) -> int:
        """Steps done with it."""
        return self.progress.step + 1


class Observer:
    """Does nothing. All are made in one place (`training/trainer/observers.py`), and those of every rank are called
    on every rank."""

    def begin(self) -> None:
        """The rehearsal is over; steps come now."""

    def step(self, step: StepDone) -> None:
        """A step is done."""

    def paused(self) -> None:
        """The loop stood still for a save."""

    def saved(self, checkpoint: Saved) -> None:
        """A checkpoint exists."""

    def scored(self, step: int, where: str, scores: Mapping[str, float]) -> None:
        """Weights after this step have been scored on a test set: mAP and rank1, 0 to 1. On the leading rank only."""

    def labelled(self) -> None:
        """The pseudo labels of an epoch have been made; its steps come now."""

    def began_anew(self) -> None:
        """The next step is a first one again: after scores, or from an earlier checkpoint."""

    def close(self) -> None:
        """The run is over, and ended well."""
