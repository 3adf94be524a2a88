"""When a checkpoint is due, and which stay. Pure."""

import math
from collections.abc import Collection, Iterable

import numpy as np

from datapipe.core.randomness import Ints
from training.checkpoint.metadata import MARKER, step_of
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


def due_steps(config: CheckpointConfig, total: int, epoch_steps: float) -> Ints:
    """All steps of a run of so many at which `due` says yes, in order: [due]."""
    return np.union1d(_multiples(config.every_steps, total), kept_steps(config, total, epoch_steps))


def kept_steps(config: CheckpointConfig, total: int, epoch_steps: float) -> Ints:
    """All steps of a run of so many at which `kept` says yes, in order: [kept]."""
    stretch, by_epoch = config.keep_every_epochs * epoch_steps, _multiples(0, total)
    if 0 < stretch < math.inf:
        turns = np.arange(1, math.floor(total / stretch + 1e-9) + 1)
        by_epoch = np.ceil((turns - 1e-9) * stretch).astype(np.int64)
    return np.union1d(_multiples(config.keep_every_steps, total), by_epoch)


def _multiples(every: int, total: int) -> Ints:
    return np.arange(every, total + 1, every, dtype=np.int64) if every else np.zeros(0, np.int64)


def _multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def superseded(
    config: CheckpointConfig,
    complete: Collection[str],
    folders: Iterable[str],
    newest: str,
    epoch_steps: float,
    foreign: Collection[str] = (),
) -> list[str]:
    """Folders that may go now that `newest` is complete. `complete`: names of all that have their marker; `foreign`:
    those that are not the run's, which count for nothing and stay."""
    old = sorted((name for name in complete if _step(name) <= _step(newest) and name not in foreign), key=_step)
    staying = {*old[-config.keep_last :], *(name for name in old if kept(config, _step(name), epoch_steps))}
    return old_folders(folders, newest, staying | {*foreign})


def old_folders(folders: Iterable[str], newest: str, staying: Collection[str]) -> list[str]:
    """All checkpoints but those that stay.

    Only what is not younger than `newest`, a complete one, is touched: younger files may be those of an attempt that
    still lives, or damaged checkpoints that this run will come to and replace. Of older steps, folders without a marker
    are partial for good: whoever still writes there is behind a complete checkpoint of the same run.
    """
    going = [name for name in folders if step_of(name) is not None and name not in staying]
    return [name for name in going if _step(name) <= _step(newest)]


def old_files(files: Collection[str], newest: str, staying: Collection[str]) -> list[str]:
    """Files of the `old_folders`, in the order to delete them: markers first, so that no half checkpoint looks
    whole."""
    going = {*old_folders(map(folder_of, files), newest, staying)}
    return sorted((file for file in files if folder_of(file) in going),
                  key=lambda file: (not file.endswith(f"/{MARKER}"), file))  # fmt: skip


def strays(files: Iterable[str], name: str, known: Iterable[str]) -> list[str]:
    """Files in a complete checkpoint's folder that are not its own: notes of its making, parts of crashed attempts."""
    own = {f"{name}/{file}" for file in (*known, MARKER)}
    return [file for file in files if folder_of(file) == name and file not in own]


def folder_of(file: str) -> str:
    """The checkpoint that a file belongs to."""
    return file.partition("/")[0]


def _step(name: str) -> int:
    return step_of(name) or 0
