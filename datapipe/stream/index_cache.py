"""The packed index of a version, fetched or made once on each machine and mapped by all its processes.

    <cache>/indexes/packed-v1-...index     under the name that it has in the data set, once it is whole and compared
    <cache>/indexes/packed-v1-...seen      which file had that sha256; as old as its last use
    <cache>/turns/                         locks of whoever fetches or makes one

A file is believed when its sha256 was that of its name, and its inode, size and times are since then what they were. A
small one is read from the data set by each process by itself, with two requests. Where the cache cannot be used, each
process holds it in its own memory.
"""

import logging
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, StorageError
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import (
    PackedIndex,
    fetch,
    name_of,
    of_version,
    pack,
    packed_entries,
    prefix,
    publish,
    sha256_of,
    stated_sha256,
    unpack,
)
from datapipe.storage import Data, Entry, Store, is_remote
from datapipe.storage.store import TEMPORARY
from datapipe.stream.disk_cache import INDEXES, Watch, locked, turn_of

log = logging.getLogger(__name__)

SMALL_ROWS = 200_000
"""A packed index of so many rows, 6 MB at most, is not worth a file in the cache."""
SEEN = ".seen"
UNUSED_S = 30 * 86_400.0
"""Seconds without a use after which a file in the cache is deleted."""
PATIENCE_S, POLL_S = 120.0, 0.02
"""Longest wait for another process that fetches or makes the file and does not get on; seconds between two looks."""


def open_index(manifest: Manifest, store: Store, storage: StorageConfig, folder: str) -> PackedIndex:
    """The packed index of a version: from the cache in `folder`, else from the data set, else made of its indexes, and
    then written into the data set.

    Raises DataError that names an index which is missing or damaged where it has to be made, StorageError where the
    data set cannot be read.
    """
    found = _Opening(manifest, store, storage, Path(folder))
    try:
        return found.of_cache() or found.of_data_set() or found.for_all()
    except _UnusableError as error:
        log.warning("the index of %s is held in the memory of each process: the cache cannot be used: %s",
                    manifest.url, error)  # fmt: skip
        return found.for_itself()


class _UnusableError(Exception):
    """The folder of the cache cannot be used."""


class _Opening:
    """The ways to a packed index."""

    def __init__(self, manifest: Manifest, store: Store, storage: StorageConfig, cache: Path) -> None:
        self.manifest, self.store, self.storage = manifest, store, storage
        self.cache, self.folder = cache, cache / INDEXES
        self.version, self.small = manifest.id, manifest.rows <= SMALL_ROWS
        self.wrong: set[str] = set()
        """Files of the data set that are not to be believed."""

    def of_cache(self) -> PackedIndex | None:
        """The file in the cache, if there is one that can be believed. Those of versions that this one took the place
        of are deleted."""
        try:
            if self.folder.stat().st_uid != os.getuid():
                return None
            paths = sorted(path for path in self.folder.iterdir() if path.name.endswith(".index"))
        except OSError:
            return None
        for path in paths:
            if any(of_version(path.name, version) for version in self.manifest.replaces):
                _forget(path)
        candidates = (self._believed(path) for path in paths if path.name.startswith(prefix(self.version)))
        return next((index for index in candidates if index is not None), None)

    def of_data_set(self) -> PackedIndex | None:
        """A small one, read from the data set."""
        for entry in packed_entries(self.store, self.manifest) if self.small else ():
            with suppress(NotFoundError), _unnamed() as file:
                file.write(self.store.read(entry.name))
                file.flush()
                if (index := self._checked(file, entry)) is not None:
                    return index
        return None

    def for_all(self) -> PackedIndex:
        """Fetched or made by one process of this machine, while the others wait for it."""
        with self._turn() as alone:
            if (index := self.of_cache() or self.of_data_set()) is not None:
                return index
            try:
                if alone:
                    self._tidy()
                fetched = self._fetched()
                path = fetched or self._made()
            except OSError as error:
                raise _UnusableError(str(error)) from error
            index = self._believed(path)
        if index is None:
            raise _UnusableError(f"{path} was changed right after it was written")
        kept = f"this machine keeps its own, {path}"
        if not fetched and self._publish(stated_sha256(path.name), path, kept) and self.small:
            _forget(path)  # the data set has it now
        return index

    def for_itself(self) -> PackedIndex:
        """In memory of this process alone."""
        for entry in packed_entries(self.store, self.manifest):
            with suppress(NotFoundError), _unnamed() as file:
                fetch(self.store, entry, file)
                if (index := self._checked(file, entry)) is not None:
                    return index
        with _unnamed() as file:
            sha256 = pack(self.manifest, file, self.storage)
            data = _mapped(file)
        self._publish(sha256, memoryview(data), "it is made anew each time")
        return unpack(data, self.manifest, self.store.url)

    def _made(self) -> Path:
        """A file of the cache, of the version's indexes."""
        with self._new_file() as (file, keep):
            return keep(pack(self.manifest, file, self.storage))

    def _fetched(self) -> Path | None:
        """The data set's file in the cache; None where it has none that can be believed."""
        for entry in packed_entries(self.store, self.manifest):
            with suppress(NotFoundError), self._new_file(self._source(entry)) as (file, keep):
                if not os.fstat(file.fileno()).st_size:
                    fetch(self.store, entry, file)
                if self._checked(file, entry) is not None:
                    return keep(stated_sha256(entry.name))
        return None

    def _source(self, entry: Entry) -> str:
        """The data set's file, where it is one of this machine."""
        path = self.store.address(entry.name)
        return "" if is_remote(self.store.url) or os.path.islink(path) else path

    @contextmanager
    def _new_file(self, source: str = "") -> Iterator[tuple[IO[bytes], Callable[[str], Path]]]:
        """(a file of the cache under a temporary name, what gives it its name by its sha256); otherwise it is deleted.
        It is another name of the file `source`, where the file system can do that, else empty."""
        path = self.folder / f"{prefix(self.version)}{secrets.token_hex(6)}{TEMPORARY}"

        def keep(sha256: str) -> Path:
            os.fsync(file.fileno())
            final = path.rename(self.folder / name_of(self.version, sha256))
            _note(final)
            return final

        linked = False
        if source:
            with suppress(OSError):
                os.link(source, path)
                linked = True
        try:
            with open(path, "rb" if linked else "x+b") as file:
                yield file, keep
        finally:
            path.unlink(missing_ok=True)

    def _checked(self, file: IO[bytes], entry: Entry) -> PackedIndex | None:
        """What a copy of the data set's file says; None, and a warning, where that is not to be believed."""
        where = self.store.address(entry.name)
        if sha256_of(file) != stated_sha256(entry.name):
            log.warning("%s is damaged: the index is made anew", where)
            self.wrong.add(entry.name)
            return None
        try:
            return unpack(_mapped(file), self.manifest, where)
        except DataError as error:
            log.warning("%s: %s: the index is made anew", where, error.what)
            self.wrong.add(entry.name)
            return None

    def _believed(self, path: Path) -> PackedIndex | None:
        """What a file of the cache says; it is deleted where that is not to be believed."""
        try:
            with open(path, "rb") as file:
                if _seen(path) != _facts(file):
                    if sha256_of(file) != stated_sha256(path.name):
                        raise DataError("it is damaged")
                    _note(path)
                else:
                    os.utime(path.with_suffix(SEEN))
                return unpack(_mapped(file), self.manifest, str(path))
        except OSError:
            return None
        except DataError as error:
            log.warning("%s is not used: %s", path, error.what)
            _forget(path)
            return None

    def _publish(self, sha256: str, data: Data, kept: str) -> bool:
        """Write it into the data set, for other machines and later runs. Says where that cannot be done, and what is
        done in place of it (`kept`)."""
        try:
            publish(self.store, self.manifest, sha256, data, self.wrong)
        except (StorageError, OSError) as error:
            log.warning("the packed index cannot be written into %s (%s): %s", self.manifest.url, error, kept)
            return False
        return True

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """While nobody else on this machine makes or fetches it; False where another one holds on and does not get
        on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.cache.stat().st_uid != os.getuid():
                raise PermissionError(f"{self.cache} belongs to another user")
        except OSError as error:
            raise _UnusableError(str(error)) from error
        begin = prefix(self.version)
        with locked(turn_of(self.cache, begin), Watch(PATIENCE_S, POLL_S, lambda: _growth(self.folder, begin))) as lock:
            yield lock is not None

    def _tidy(self) -> None:
        """Delete what processes that were killed have left of this version, and what nobody has opened for long."""
        for path in self.folder.glob(f"{prefix(self.version)}*{TEMPORARY}"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.index"):
            with suppress(OSError):
                note = path.with_suffix(SEEN)
                used = (note if note.exists() else path).stat().st_mtime
                if time.time() - used > UNUSED_S:
                    _forget(path)


def _growth(folder: Path, begin: str) -> tuple[tuple[str, int, int], ...]:
    """What tells that somebody writes files which begin so."""
    found = []
    for path in folder.glob(f"{begin}*"):
        with suppress(OSError):
            facts = path.stat()
            found.append((path.name, facts.st_size, facts.st_mtime_ns))
    return tuple(sorted(found))


def _facts(file: IO[bytes]) -> str:
    """What changes whenever somebody writes into a file or puts another one in its place."""
    facts = os.fstat(file.fileno())
    return f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def _seen(path: Path) -> str:
    """The facts of the file whose sha256 was compared; empty where none was."""
    try:
        return path.with_suffix(SEEN).read_text()
    except OSError:
        return ""


def _note(path: Path) -> None:
    """Note that the file's sha256 was compared."""
    note = path.with_suffix(SEEN)
    temporary = note.with_name(f"{note.name}.{secrets.token_hex(6)}{TEMPORARY}")
    with open(path, "rb") as file:
        temporary.write_text(_facts(file))
    temporary.rename(note)


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        path.with_suffix(SEEN).unlink()


def _mapped(file: IO[bytes]) -> "mmap.mmap | bytes":
    """The whole file as memory that is shared with all who map it."""
    size = os.fstat(file.fileno()).st_size
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""


def _unnamed() -> IO[bytes]:
    """A file without a name, in memory where the system knows such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("packed-index", os.MFD_CLOEXEC), "w+b")
    return tempfile.TemporaryFile(prefix="reid_packed_")
