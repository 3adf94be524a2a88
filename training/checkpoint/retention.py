"""When a checkpoint is due, and which stay. Pure."""

import math
from collections.abc import Collection, Iterable, Sequence

from training.checkpoint.metadata import MARKER, completed, step_of
from training.checkpoint.settings import CheckpointConfig


def due(config: CheckpointConfig, step: int, epoch_steps: float) -> bool:
    """Is it time to save after this many steps, by the count of steps?"""
    return _multiple(step, config.every_steps) or kept(config, step, epoch_steps)


def kept(config: CheckpointConfig, step: int, epoch_steps: float) -> bool:
    """Does the checkpoint of this step stay for evaluation? Of every K epochs it is the first one at or after them."""
    if _multiple(step, config.keep_every_steps):
        return True
    stretch = config.keep_every_epochs * epoch_steps
    return stretch > 0 and math.floor(step / stretch + 1e-9) > math.floor((step - 1) / stretch + 1e-9)


def _multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def superseded(
    config: CheckpointConfig, files: Sequence[str], newest: str, epoch_steps: float, foreign: Collection[str] = ()
) -> list[str]:
    """Names of files that may go now that `newest` is complete. `files`: all below the folder; `foreign`: checkpoints
    that are not the run's, which count for nothing and stay."""
    old = [name for name in completed(files) if _step(name) <= _step(newest) and name not in foreign]
    staying = {*old[-config.keep_last :], *(name for name in old if kept(config, _step(name), epoch_steps))}
    return old_files(files, newest, staying | {*foreign})


def old_files(files: Iterable[str], newest: str, staying: Collection[str]) -> list[str]:
    """Files of all checkpoints but those that stay, in the order to delete them: markers first, so that no half
    checkpoint looks whole.

    Only what is not younger than `newest`, a complete one, is touched: younger files may be those of an attempt that
    still lives, or damaged checkpoints that this run will come to and replace. Of older steps, folders without a marker
    are partial for good: whoever still writes there is behind a complete checkpoint of the same run.
    """
    going = [file for file in files if step_of(folder_of(file)) is not None and folder_of(file) not in staying]
    going = [file for file in going if _step(folder_of(file)) <= _step(newest)]
    return sorted(going, key=lambda file: (not file.endswith(f"/{MARKER}"), file))


def strays(files: Iterable[str], name: str, known: Iterable[str]) -> list[str]:
    """Files in a complete checkpoint's folder that are not its own: notes of its making, parts of crashed attempts."""
    own = {f"{name}/{file}" for file in (*known, MARKER)}
    return [file for file in files if folder_of(file) == name and file not in own]


def folder_of(file: str) -> str:
    """The checkpoint that a file belongs to."""
    return file.partition("/")[0]


def _step(name: str) -> int:
    return step_of(name) or 0
