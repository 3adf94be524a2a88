"""A bounded folder of blocks on a local disk, shared by all processes of a machine, keyed by content alone.

    <sha256 of the shard>-<hash of the ranges>   a block: written under another name, renamed, never changed
    lock                                         held by whoever adds or evicts; says how many bytes of blocks there
                                                 are, never less than that
    turns/                                       a lock for each block that is being fetched
    indexes/                                     packed indexes, see index_cache.py; they do not count

Nothing depends on it. Locks die with the process that holds them; a file that vanishes or comes up short counts as not
there; who waits too long for another process goes on without it. What the blocks hold is checked by whoever reads them.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from datapipe.core.errors import StorageError
from datapipe.storage.store import TEMPORARY

log = logging.getLogger(__name__)

ByteRange = tuple[int, int]
"""(first byte, bytes) within a block."""

PATIENCE_S = 30.0
"""Longest wait for another process, which may have been halted."""
POLL_S = 0.001
TURNS = 1024
RETIRED_NS = 10 * 365 * 86_400 * 10**9
"""By how much older a block is made when it is retired."""
ROOM_MADE = 0.05
"""Share of the limit that an eviction frees beyond what is needed, so that not every block causes one."""
INDEXES = "indexes"
SERVICE = ("lock", "turns", INDEXES)
DIGITS = 20
"""Digits of the cache's total size in the file that counts it."""


class DiskCache:
    """A node's cache of blocks on its disk. Holds at most `limit` bytes; retired blocks go first, then the oldest.

    Raises StorageError where the folder cannot be used or belongs to somebody else.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._works = True
        try:
            (self.folder / "turns").mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to another user")
            with self._alone() as lock:
                if lock is not None:
                    self._evict(lock, limit)
        except OSError as error:
            raise StorageError(
                f"the cache cannot be used: {error}",
                where=folder,
                hint="stream.cache_dir names another folder; stream.cache_gb = 0 does without",
            ) from error

    def held(self, key: str, parts: Sequence[ByteRange]) -> list[bytes] | None:
        """These parts of a block; None where it is not there, or not whole."""
        try:
            file = os.open(self.folder / key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            chunks = [os.pread(file, size, start) for start, size in parts]
        except OSError:
            return None
        finally:
            os.close(file)
        return chunks if all(len(data) == size for data, (_, size) in zip(chunks, parts, strict=True)) else None

    def has(self, key: str) -> bool:
        """Whether the block is there."""
        return (self.folder / key).exists()

    def load(self, key: str, parts: Sequence[ByteRange], fetch: Callable[[], bytes]) -> list[bytes]:
        """These parts of a block that was not held: fetched here, or by another thread or process just now."""
        with self._turn(key):
            chunks = self.held(key, parts)
            if chunks is not None:
                return chunks
            self.forget(key)  # else it is there, but not whole
            block = fetch()
            self._add(key, block)
        return [block[start : start + size] for start, size in parts]

    def keep(self, key: str) -> None:
        """A block that may be there will be wanted: it goes after those that are there longer."""
        with suppress(OSError):
            os.utime(self.folder / key)

    def retire(self, key: str) -> None:
        """A block is not wanted for long: of all those that may go it goes first, after those retired before it."""
        retired = time.time_ns() - RETIRED_NS
        with suppress(OSError):
            os.utime(self.folder / key, ns=(retired, retired))

    def forget(self, key: str) -> None:
        """Drop a block; its bytes were found to be wrong."""
        with suppress(OSError):
            (self.folder / key).unlink()

    def drop(self, shards: Collection[str]) -> None:
        """Delete all blocks of the shards with these sha256 (hex)."""
        with self._alone():
            for path in self._blocks():
                if path.name.partition("-")[0] in shards:
                    path.unlink(missing_ok=True)

    def _add(self, key: str, block: bytes) -> None:
        if len(block) > self.limit or not self._works:
            return
        temporary = self.folder / f"{key}{TEMPORARY}"
        try:
            with self._alone() as lock:
                if lock is None or self.has(key):
                    return
                self._make_room(lock, len(block))
                temporary.write_bytes(block)
                temporary.rename(self.folder / key)
        except OSError as error:
            self._works = False
            log.warning("nothing more is written to the cache %s: %s", self.folder, error)
            with suppress(OSError):
                temporary.unlink()

    def _make_room(self, lock: int, size: int) -> None:
        """Note that the folder grows by so much, before it does: who dies in between leaves too high a total."""
        noted = os.pread(lock, DIGITS, 0)
        total = int(noted) if noted else self._evict(lock, self.limit)
        if total + size > self.limit:
            total = self._evict(lock, max(0, int((1 - ROOM_MADE) * self.limit) - size))
        _note(lock, total + size)

    def _evict(self, lock: int, goal: int) -> int:
        """Delete the oldest blocks until no more than `goal` bytes are left; returns how many are left, counted.

        What dead processes had begun to write goes too.
        """
        ages = []
        for path in self._blocks():
            with suppress(FileNotFoundError):
                if path.name.endswith(TEMPORARY):
                    path.unlink()
                    continue
                facts = path.stat()
                ages.append((facts.st_mtime_ns, path, facts.st_size))
        total = sum(size for _, _, size in ages)
        for _, path, size in sorted(ages):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        _note(lock, total)
        return total

    def _blocks(self) -> Iterator[Path]:
        with os.scandir(self.folder) as entries:
            yield from (Path(item.path) for item in entries if item.name not in SERVICE)

    def _alone(self) -> AbstractContextManager[int | None]:
        return locked(self.folder / "lock")

    def _turn(self, key: str) -> AbstractContextManager[int | None]:
        return locked(turn_of(self.folder, key))


def _note(lock: int, total: int) -> None:
    """Overwrite the total in place: a file that is truncated and rewritten is flushed to the disk at once."""
    os.pwrite(lock, b"%0*d" % (DIGITS, total), 0)


class Watch(NamedTuple):
    """How long another process is waited for."""

    patience_s: float
    poll_s: float
    progress: Callable[[], object] = lambda: None
    """What changes as long as the other one gets on; the wait begins anew then."""


def turn_of(folder: Path, key: str) -> Path:
    """The lock of who fetches what has this key."""
    return folder / "turns" / f"{xxhash.xxh3_64_intdigest(key.encode()) % TURNS:03x}"


@contextmanager
def locked(path: Path, watch: Watch | None = None) -> Iterator[int | None]:
    """Hold an exclusive lock on this open file, also against threads; None where it is not to be had (in time)."""
    file = _open(path)
    if file is None:
        yield None
        return
    try:
        yield file if _lock(file, path, watch or Watch(PATIENCE_S, POLL_S)) else None
    finally:
        os.close(file)


def _open(path: Path) -> int | None:
    for _ in range(2):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # somebody has tidied the folder away
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return None
    return None


def _lock(file: int, path: Path, watch: Watch) -> bool:
    end, state = time.monotonic() + watch.patience_s, watch.progress()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                if state == (now := watch.progress()):
                    log.warning("another process has held %s for %.0f s: going on without it", path, watch.patience_s)
                    return False
                end, state = time.monotonic() + watch.patience_s, now
        time.sleep(watch.poll_s)


def default_folder() -> str:
    """This user's folder for blocks among the temporary files of the machine."""
    return os.path.join(tempfile.gettempdir(), f"datapipe-blocks-{os.getuid()}")
