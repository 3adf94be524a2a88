"""What the thread of a save does: writes this rank's part; on the leading rank, then, the marker that makes it exist.

Nothing here communicates: the ranks agree in `training/checkpoint/manager.py`.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from datapipe.core.errors import DataError, LeaseError, NotFoundError, StorageError, UserError
from datapipe.storage import Store
from training.checkpoint.lineage import Head, survey, term_of
from training.checkpoint.metadata import MARKER, Form, Marker, file_from, name_of, read_marker
from training.checkpoint.retention import strays, superseded
from training.checkpoint.settings import CheckpointConfig
from training.checkpoint.snapshot import RankSnapshot
from training.core.run_folder.write_guard import WriteGuard


class BackgroundTask(threading.Thread):
    """Work beside the training. It does not keep the process from ending: what it leaves is partial, and absent."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  (carried to the thread that asks)
            self._error = error

    @property
    def done(self) -> bool:
        return not self.is_alive()

    @property
    def failure(self) -> str:
        """What went wrong, for a person; empty while nothing has. Raises what no user can act on."""
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error
        return "" if self._error is None else f"{self._error.what} ({self._error.where})"


def part_name(rank: int, save: str) -> str:
    """A rank's file within the checkpoint's folder. `save`: told apart from every other attempt and save."""
    return f"rank_{rank:05d}.{save}.safetensors"


def note_name(rank: int, save: str) -> str:
    """The file that holds a rank's entry for the marker until there is a marker."""
    return f"rank_{rank:05d}.{save}.json"


def write_part(store: Store, folder: str, rank: int, save: str, part: RankSnapshot) -> None:
    """The rank's file, then the note that says what is in it."""
    name = part_name(rank, save)
    store.replace(f"{folder}/{name}", part.content)
    note = {"file": asdict(part.file(name)), "tensors": part.tensors}
    store.replace(f"{folder}/{note_name(rank, save)}", json.dumps(note).encode())


def write_marker(store: Store, save: str, about: Mapping[str, Any], guard: WriteGuard) -> Marker:
    """The marker, from all ranks' notes. Raises StorageError when a part is gone: another attempt swept it, LeaseError
    when another process has taken over.

    `about`: the fields of `Marker` but for files and tensors.
    """
    folder = name_of(about["step"])
    files, tensors = [], {}
    for rank in range(about["world"]):
        name = f"{folder}/{note_name(rank, save)}"
        try:
            note = json.loads(store.read(name))
            file = file_from(note["file"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"a rank's note is damaged: {error}", where=store.address(name),
                               hint="the next save writes it anew") from error  # fmt: skip
        if store.size(f"{folder}/{file.name}") != file.bytes:
            raise StorageError("a part is not as it was written", where=store.address(f"{folder}/{file.name}"))
        files.append(file)
        tensors.update({key: Form(tuple(shape), dtype) for key, (shape, dtype) in note["tensors"].items()})
    marker = Marker(files=tuple(files), tensors=tensors, time=time.time(), **about)
    guard.confirm()
    if not store.put_if_absent(f"{folder}/{MARKER}", marker.to_bytes()):
        _replace_marker(store, folder, marker, guard)
    return marker


def _replace_marker(store: Store, folder: str, marker: Marker, guard: WriteGuard) -> None:
    """Replace a marker that is damaged, that is not on this run's line, or that is this very one, whose answer was
    lost."""
    try:
        if read_marker(store, folder).term > marker.term:
            guard.confirm()
            raise LeaseError(f"the checkpoint of step {marker.step:,} is there already, of a later term",
                             where=store.address(folder))  # fmt: skip
    except (DataError, NotFoundError):
        pass  # damaged
    store.replace(f"{folder}/{MARKER}", marker.to_bytes())


def prune(
    store: Store,
    config: CheckpointConfig,
    marker: Marker,
    epoch_steps: float,
    heads: dict[str, Head],
    guard: WriteGuard,
) -> None:
    """Delete what the new checkpoint supersedes, and what in its folder is not its own; nothing of a later term.
    `heads`: as `survey` has it. Raises LeaseError when another process has taken over."""
    guard.confirm()
    newest, names = name_of(marker.step), [*(entry.name for entry in store.list()), *store.unfinished()]
    own = [file.name for file in marker.files]
    heads[newest] = Head(marker.step, marker.term)
    foreign = survey(store, names, heads).passed_over
    for name in (*superseded(config, names, newest, epoch_steps, foreign), *strays(names, newest, own)):
        if term_of(name, heads) <= marker.term:
            store.delete(name)


def sweep(store: Store, folder: str, rank: int, save: str) -> None:
    """Take back what a rank wrote for a save that failed."""
    for name in (part_name(rank, save), note_name(rank, save)):
        store.delete(f"{folder}/{name}")


def tidy(work: Callable[[], object], warn: Callable[[str], None]) -> None:
    """Tidying: its faults are told, and the next save tidies again."""
    try:
        work()
    except (StorageError, DataError) as error:
        warn(f"warning: old checkpoint files were not deleted: {error.what} ({error.where})")


def unlike(texts: Sequence[str]) -> str:
    """What several ranks tell, each once."""
    return "; ".join(dict.fromkeys(text for text in texts if text))
