"""Settings of checkpoints: when they are saved, and which stay."""

from pydantic import Field

from datapipe.core.settings import settings


@settings
class CheckpointConfig:
    every_steps: int = Field(default=1_000, ge=0)
    """Optimizer steps between checkpoints: at most this much is redone after a crash. 0: every_minutes alone tells."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Minutes between checkpoints, whichever of the two comes first. 0: every_steps alone tells."""
    max_failed_saves: int = Field(default=3, ge=1)
    """Checkpoints in a row that may fail to be written (store away, disk full) until the run ends, resumable."""
    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints that stay. At least two: a damaged one falls back to the one before."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this are made and stay for evaluation. 0: none besides the newest."""
    keep_every_epochs: float = Field(default=0.0, ge=0)
    """Checkpoints at the first step at or after each multiple of so many epochs are made and stay, too. 0: none."""
