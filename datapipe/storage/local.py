"""A folder of this machine or of a shared file system."""

import os
import resource
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from datapipe.core.errors import NotFoundError, RefusedError, StorageError
from datapipe.core.progress import has_read
from datapipe.storage.store import TEMPORARY, Children, Data, Entry, Store

NAMES_AT_ONCE = 1 << 16
MOST_OPEN = 512
"""Files that OpenFilesStore keeps open, or a quarter of what the process may have open if that is less."""
LARGE_BYTES = 1 << 20
"""Reads of more are held against the size of the file first."""
MOST_PER_READ = 1 << 30
"""Linux gives at most 2 GiB per call."""


class LocalStore(Store):
    """A folder. Created on the first write."""

    def __init__(self, path: str) -> None:
        self.url = os.path.expanduser(path)

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self.refuse_outside(name)
        # Opening costs 5 us of the 10 us of a small read. Descriptors kept open would have to be compared with the
        # path each time (it may have been replaced), which costs as much, and would hold the room of deleted files.
        with self._faults(name):
            # A pipe among the images is empty then; otherwise, somebody would have to write into it first.
            file = os.open(self.address(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if size is None or size > LARGE_BYTES:  # room is made for what is there, not for what might be
                    present = os.fstat(file).st_size - start
                    size = present if size is None else min(size, present)
                return _read_fully(file, start, size)
            finally:
                os.close(file)

    def size(self, name: str) -> int:
        with self._faults(name):
            path = self._path(name)
            if path.is_dir():
                raise FileNotFoundError(path)
            return path.stat().st_size

    def list(self, prefix: str = "", *, enter: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        self._refuse_absent()
        folder = prefix.rpartition("/")[0]
        if os.path.isdir(self._path(folder)):
            start = folder + "/" if folder else ""
            yield from self._walk(start, prefix, enter, (os.path.realpath(self._path(folder)),))

    def children(self) -> Children:
        self._refuse_absent()
        with self._faults(""):
            names = [os.fsdecode(name) for name in _sorted_names(Path(self.url))]
        folders = sorted(name.removesuffix("/") for name in names if name.endswith("/"))
        return Children(folders, [name for name in names if not name.endswith(("/", TEMPORARY))])

    def _refuse_absent(self) -> None:
        with self._faults(""):
            if not os.path.isdir(self.url):
                raise NotADirectoryError(self.url) if os.path.exists(self.url) else FileNotFoundError(self.url)

    def _walk(
        self, folder: str, prefix: str, enter: Callable[[str], bool] | None, parents: tuple[str, ...]
    ) -> Iterator[Entry]:
        """What another process deletes meanwhile is left out, as if it had been deleted before."""
        with self._faults(folder):
            try:
                names = _sorted_names(self._path(folder))
            except FileNotFoundError:
                return
        for raw in names:
            name = folder + os.fsdecode(raw)
            if not (name.startswith(prefix) or prefix.startswith(name)) or name.endswith(TEMPORARY):
                continue
            path = self.address(name)
            if not name.endswith("/"):
                with self._faults(name):
                    size = _size_if_present(path)
                if size is not None:
                    yield Entry(name, size)
            elif enter is not None and not enter(name):
                continue
            elif (real := os.path.realpath(path)) not in parents:  # a link to a folder above would never end
                yield from self._walk(name, prefix, enter, (*parents, real))

    def put_if_absent(self, name: str, data: Data) -> bool:
        with self._faults(name), self._whole(name, data) as temporary:
            self.permit()
            try:
                os.link(temporary, self._path(name))
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links has no such condition
                os.replace(temporary, self._path(name))
            return True

    def replace(self, name: str, data: Data) -> None:
        with self._faults(name), self._whole(name, data) as temporary:
            self.permit()
            os.replace(temporary, self._path(name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        self.permit()
        with self._faults(name):
            path.unlink(missing_ok=True)
        if "/" in name:
            with suppress(OSError):  # object stores have no empty folders either
                path.parent.rmdir()

    def unfinished(self) -> Iterator[str]:
        with self._faults(""):
            for path in sorted(Path(self.url).rglob(f".*{TEMPORARY}")):
                yield str(path.relative_to(self.url))

    def at(self, *parts: str) -> Store:
        for part in parts:
            self.refuse_outside(part)
        return LocalStore(os.path.join(self.url, *parts))

    def linked_out(self, names: Iterable[str]) -> Iterator[str]:
        root = os.path.realpath(self.url)
        for name in names:
            if os.path.commonpath([root, os.path.realpath(self._path(name))]) != root:
                yield name

    def _path(self, name: str) -> Path:
        self.refuse_outside(name)
        return Path(self.url, name)

    @contextmanager
    def _whole(self, name: str, data: Data) -> Iterator[Path]:
        """A complete, synced file beside the final one; the folder is synced after the caller has named it."""
        folder = self._path(name).parent
        temporary = folder / f".{self._path(name).name}.{secrets.token_hex(6)}{TEMPORARY}"
        try:
            with _new_file(temporary) as file:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        where = self.address(name)
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if os.path.islink(where):
                hint = "delete it; `find FOLDER -xtype l` lists all of its kind"
                raise NotFoundError("the link leads nowhere", where=where, hint=hint) from error
            what = "the file does not exist" if name else "the folder does not exist"
            raise NotFoundError(what, where=where, hint="check the path for a typing mistake") from error
        except NotADirectoryError as error:
            raise NotFoundError(
                "this is not a folder", where=where, hint="give the folder, not a file in it"
            ) from error
        except OSError as error:
            kind = RefusedError if isinstance(error, PermissionError) else StorageError
            raise kind(
                f"the file system refused: {error.strerror or error}",
                where=where,
                hint="check the permissions and the free space there",
            ) from error


class OpenFilesStore(LocalStore):
    """A local folder for many small reads: its files stay open.

    Opening and closing cost half of a small read. A file that was deleted or replaced since is opened anew: it has
    no name left, which the descriptor tells.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MOST_OPEN if allowed == resource.RLIM_INFINITY else min(MOST_OPEN, allowed // 4)
        self._lock = Lock()
        self._files: dict[str, _File] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return OpenFilesStore, (self.url,)

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if size is not None:
            try:
                file = self._files.get(name)  # as a rule it is there, and no lock is needed
                if file is None or file.gone():
                    file = self._open(name)
                data = os.pread(file.number, size, start)
                has_read(len(data))
                return data if len(data) == size else _read_fully(file.number, start, size)
            except OSError:
                pass  # the plain way says what is wrong
        return super().read(name, start=start, size=size)

    def close(self) -> None:
        """Close the files, once nobody reads them any more."""
        with self._lock:
            self._files.clear()

    def _open(self, name: str) -> "_File":
        self.refuse_outside(name)
        with self._lock:
            self._files.pop(name, None)
            file = self._files[name] = _File(self.address(name))
            if len(self._files) > self._most:
                del self._files[next(iter(self._files))]  # the one opened first
        return file


class _File:
    """An open file; closed with the last reference, so that no thread reads a number that means another file by now."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def gone(self) -> bool:
        """Whether its name means another file, or none, by now."""
        return not os.fstat(self.number).st_nlink

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _size_if_present(path: str) -> int | None:
    """Bytes; None for a file that was deleted after its name was read. Raises OSError, for a dangling link too."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        if os.path.lexists(path):
            raise
        return None


def _sorted_names(folder: Path) -> np.ndarray:
    """Names of a folder's files and folders as one array of bytes: millions of strings would take gigabytes.

    Folders end in a slash, so that full names come out sorted: "a.b" < "a/b".
    """
    chunks = [np.empty(0, "S1")]
    with os.scandir(folder) as scan:
        names = (os.fsencode(item.name) + b"/" * item.is_dir() for item in scan)
        while chunk := list(islice(names, NAMES_AT_ONCE)):
            chunks.append(np.array(chunk))
    joined = np.concatenate(chunks)
    joined.sort()
    return joined


def _new_file(path: Path) -> BinaryIO:
    """A new file for writing, and its folder. A second try where somebody removed the empty folder in between."""
    for last in (False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return open(path, "xb")
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("unreachable")


def _read_fully(file: int, start: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(file, min(size, MOST_PER_READ), start)):
        parts.append(part)
        has_read(len(part))
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
