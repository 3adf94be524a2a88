"""The folder a run leaves behind: plain files, local or on object storage, that everything else only reads."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.core.errors import NotFoundError, refusal
from datapipe.core.process_setup import shown
from datapipe.storage import Store, is_remote, open_store
from training.core.run_folder.append_files import GrowingFiles
from training.core.run_folder.write_guard import FREE, GuardedStore, WriteGuard

PROBE_BYTES = 65_536
"""Written to see whether there is any room; what a run writes before its first step."""


class RunFolder:
    """Writes and reads a run's files. Growing files are appended locally and rewritten at intervals elsewhere.

    Layout: command.txt, config.toml, deepspeed.json, environment.json, log.txt, views.json, first_batch.jpg,
    metrics/attempt_001.jsonl, ranks/rank_00.json, checkpoints/, exports/, evaluation/, tensorboard/, report.html, and
    lease/, which says who writes the others.
    """

    def __init__(self, url: str, storage: StorageConfig, guard: WriteGuard = FREE) -> None:
        """`guard` is asked before each write, which raises LeaseError where another process has taken over."""
        self.url, self.storage, self.guard = url, storage, guard
        self.store: Store = GuardedStore(open_store(url, storage), guard)
        self.local: Path | None = None if is_remote(url) else Path(self.store.url)
        self._growing = GrowingFiles(self.store)

    def at(self, *parts: str) -> Store:
        """The store of a sub-folder."""
        return self.store.at(*parts)

    def refuse_unwritable(self) -> None:
        """Raises StorageError where nothing can be written into a local folder, or where it is to be made; leaves
        nothing there. Object stores say so at the first write."""
        if self.local is None:
            return
        place = next(place for place in (self.local, *self.local.parents) if os.path.lexists(place))
        try:
            with tempfile.NamedTemporaryFile(prefix=".probe-", dir=place) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(error, where=str(place)) from error

    def begin(self, name: str, line: str) -> None:
        """Make a file that is to grow, with its first line: there as soon as the store has it, so that its name is
        taken."""
        self.write_soon(name, line + "\n", hurry=True)

    def append(self, name: str, line: str) -> None:
        """Add a line to a file that only this process writes, as a terminal may show it. Raises StorageError."""
        line = shown(line)
        if self.local is not None:
            path = self.local / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _append(path, (line + "\n").encode(), self.guard)
            except OSError as error:
                raise refusal(error, where=str(path)) from error
            return
        if self.guard.lost:
            raise self.guard.lost
        self._growing.append(name, line)

    def flush(self) -> None:
        """Returns when all that was given is on storage; from any thread. Raises StorageError."""
        self._growing.flush()

    def write_soon(self, name: str, content: str | bytes, *, hurry: bool = False) -> None:
        """Write a whole file anew: on object storage by a thread, when it does so anyway or in a hurry; if it changes
        before, only the last content."""
        if self.local is not None:
            self.write(name, content)
        else:
            self._growing.replace(name, _bytes(content), hurry=hurry)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file anew."""
        if self.local is not None:
            self.store.replace(name, _bytes(content))
        else:
            self._growing.write(name, _bytes(content))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, as_json(value))

    def read_text(self, name: str) -> str | None:
        """A file's text; None if it is not there."""
        try:
            return self.store.read(name).decode("utf-8-sig")  # an editor may have begun it with a byte order mark
        except NotFoundError:
            return None

    def read_record(self, name: str) -> dict[str, Any]:
        """A file that is a JSON object; empty where it is not there. Raises DataError where it is damaged."""
        try:
            return self.store.read_record(name, what="a file of the run", hint="copy it again, or delete it")
        except NotFoundError:
            return {}

    def names(self, prefix: str) -> Iterator[str]:
        """Names below the folder that start with `prefix`; nothing where the folder is not there yet."""
        try:
            yield from (entry.name for entry in self.store.list(prefix))
        except NotFoundError:
            return


def as_json(value: Any) -> str:
    """As the run folder's files have it."""
    return json.dumps(value, indent=2) + "\n"


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _append(path: Path, data: bytes, guard: WriteGuard) -> None:
    """All of it or nothing: on a full disk half a line would spoil the next one, too. Raises OSError, LeaseError."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        guard.check()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
