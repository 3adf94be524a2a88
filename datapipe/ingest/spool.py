"""The place between reading and writing: where it is, that it has room, and that one run at a time uses it."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, StorageError
from datapipe.storage import Store, is_remote, open_store, resolved_url

FOLDER, LOCK = ".spool", "lock"


@contextlib.contextmanager
def opened_spool(chosen: str, out: str, storage: StorageConfig) -> Iterator[tuple[Store, Path | None]]:
    """(the spool of the data set in `out`, its folder if it is on a file system). Emptied if the context ends well.

    A second run of this machine is kept away for as long; the lock ends with the process, however it ends.
    """
    url = _url(chosen, out)
    store = open_store(url, storage)
    if is_remote(url):
        yield store, None
        empty(store)
        return
    folder = Path(url)
    with _locked(folder, out):
        yield store, folder
        shutil.rmtree(folder, ignore_errors=True)


def spool_of(out: str) -> str:
    """Where the spool of the data set in `out` is, unless another folder was chosen."""
    return _url("", out)


def empty(store: Store) -> None:
    """Remove all objects of a spool."""
    with contextlib.suppress(NotFoundError):
        for entry in list(store.list()):
            store.delete(entry.name)


def check_room(folder: Path | None, wanted: int) -> None:
    """StorageError where a local spool has less than `wanted` bytes of room, what it already holds included."""
    if folder is None:
        return
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("*.crops"))
    if free < wanted:
        raise StorageError(
            f"the spool needs about {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(folder),
            hint="make room there, or give another folder with --spool",
        )


def _url(chosen: str, out: str) -> str:
    """A folder of this data set's own, so that it may be emptied."""
    name = hashlib.sha256(resolved_url(out).encode()).hexdigest()[:16]
    if chosen:
        return f"{resolved_url(chosen)}/{name}"
    if not is_remote(out):
        return f"{resolved_url(out)}/{FOLDER}"
    return f"{tempfile.gettempdir()}/datapipe-spool-{os.getuid()}-{name}"


@contextlib.contextmanager
def _locked(folder: Path, out: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise StorageError(
            f"the spool cannot be made: {error.strerror}",
            where=str(folder),
            hint="check the permissions there, or give another folder with --spool",
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                "another run is writing this data set right now", where=out, hint="wait for it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove the spool, and the folder that was made for it, where nothing else is in them."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
    with contextlib.suppress(OSError):
        if not folder.exists():
            folder.parent.rmdir()
