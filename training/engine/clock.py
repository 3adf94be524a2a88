"""Where a run stands, from nothing but the number of samples seen."""

import math
from dataclasses import dataclass

from datapipe.core.errors import ConfigError
from training.methods.base import TrainingProgress


@dataclass(frozen=True)
class Clock:
    """Turns a place in the stream into steps, epochs and the fraction of the whole run.

    Depends on the global batch, the length of an epoch and the number of epochs, never on the world.
    """

    batch: int
    epoch_samples: int
    epochs: float
    seed: int

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(
                f"{self.epochs:g} epochs of {self.epoch_samples} samples are less than one batch of {self.batch}",
                where="optimisation.batch, optimisation.epochs",
                hint="a smaller batch, more epochs, or a larger data set",
            )

    @property
    def total_steps(self) -> int:
        return math.floor(self.epochs * self.epoch_samples / self.batch + 1e-9)

    @property
    def epoch_steps(self) -> float:
        return self.epoch_samples / self.batch

    @property
    def end(self) -> int:
        """Samples seen when the run is complete."""
        return self.total_steps * self.batch

    @property
    def epoch_ends(self) -> list[int]:
        """Samples seen at the end of each epoch; the last one may be cut short."""
        return [*range(self.epoch_samples, self.end, self.epoch_samples), self.end]

    def at(self, samples: int) -> TrainingProgress:
        """The progress before the step that starts at this place of the stream."""
        step = samples // self.batch
        return TrainingProgress(
            samples=samples,
            step=step,
            epoch=samples // self.epoch_samples,
            fraction=step / self.total_steps,
            total_steps=self.total_steps,
            epoch_steps=self.epoch_steps,
            seed=self.seed,
            batch=self.batch,
        )
