"""What the thread of a save does: writes this rank's part; on the leading rank, then, the marker that makes it exist.

Nothing here communicates: the ranks agree in `training/checkpoint/manager.py`, and tell of their parts by
`training/checkpoint/announcements.py`.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datapipe.core.errors import DataError, LeaseError, NotFoundError, UserError
from datapipe.storage import Store
from training.checkpoint.announcements import Announcement
from training.checkpoint.metadata import MARKER, Form, Marker, name_of, read_marker
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


def write_part(store: Store, folder: str, rank: int, save: str, part: RankSnapshot) -> Announcement:
    """Write the rank's file once it has arrived; what the marker will say of it."""
    part.wait()
    name = part_name(rank, save)
    store.replace(f"{folder}/{name}", part.content)
    return Announcement(part.file(name), part.tensors)


def write_marker(store: Store, parts: Sequence[Announcement], about: Mapping[str, Any], guard: WriteGuard) -> Marker:
    """The marker, from what all ranks have announced: nothing is asked of the store but whether this process may still
    write. Raises LeaseError when another process has taken over.

    `about`: the fields of `Marker` but for files and tensors.
    """
    folder = name_of(about["step"])
    tensors: dict[str, Form] = {}
    for part in parts:
        tensors.update(part.tensors)
    marker = Marker(files=tuple(part.file for part in parts), tensors=tensors, time=time.time(), **about)
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


def unlike(texts: Sequence[str]) -> str:
    """What several ranks tell, each once."""
    return "; ".join(dict.fromkeys(text for text in texts if text))
