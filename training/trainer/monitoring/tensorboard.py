"""A run as TensorBoard shows it: the recorder's numbers in groups of tags, scores, checkpoints; on any storage.

In a local run folder every step is there at once. On object storage, where a file cannot grow, it is written here and
copied there as a whole now and then; so that it stays small, only MOST_POINTS steps of a run are in it.
"""

import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from training.core.run_folder.run_folder import RunFolder

MOST_POINTS = 4_000
"""Most points of a curve on object storage."""
COPY_S = 60.0
"""Seconds between copies to object storage, at least."""
GROUPS = {
    "speed": {"images_per_s", "mfu", "model_tflops", "wait_share", "reading_share", "fetched_mb_per_s", "cache_hits",
              "bytes_fetched"},
    "schedule": {"lr", "weight_decay", "momentum", "epoch", "done", "samples", "teacher_temp"},
}  # fmt: skip
NO_CURVES = {"step", "time", "bottleneck"}


@cache
def tag_of(name: str) -> str:
    """The tag of a number that is recorded: `loss/total`, `loss/cls`, `speed/images_per_s`, `health/grad_norm`."""
    if name == "loss" or name.startswith("loss_"):
        return f"loss/{name.removeprefix('loss').removeprefix('_') or 'total'}"
    group = next((group for group, names in GROUPS.items() if name in names), "health")
    return f"{group}/{name}"


class EventWriter:
    """Writes the event file of one attempt."""

    def __init__(self, folder: RunFolder, *, total_steps: int) -> None:
        from torch.utils.tensorboard.writer import FileWriter

        self.folder = folder
        self._scratch = tempfile.TemporaryDirectory(prefix="board_") if folder.local is None else None
        self._place = Path(self._scratch.name) if self._scratch else folder.local / "tensorboard"  # type: ignore
        self._every = max(1, total_steps // MOST_POINTS) if self._scratch else 1
        self._writer = FileWriter(str(self._place))
        self._copied = time.monotonic()

    def step(self, line: Mapping[str, Any]) -> None:
        """The record of a step."""
        if line["step"] % self._every == 0:
            self._add({tag_of(name): value for name, value in line.items() if name not in NO_CURVES}, line["step"])
        if self._scratch and time.monotonic() - self._copied > COPY_S:
            self._copy()

    def add(self, tag: str, value: float, step: int) -> None:
        """A number that is not of a step's record: a score, a checkpoint."""
        self._add({tag: value}, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._scratch:
            self._copy()
        self._writer.close()
        if self._scratch:
            self._scratch.cleanup()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        """As one event: the writer takes few at a time, and who has more of them waits for the disk."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._writer.add_summary(Summary(value=points), step)

    def _copy(self) -> None:
        self._writer.flush()
        for path in self._place.iterdir():
            self.folder.write_soon(f"tensorboard/{path.name}", path.read_bytes())
        self._copied = time.monotonic()
