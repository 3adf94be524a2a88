"""Any URL scheme that fsspec knows."""

import errno
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from datapipe.core.config import StorageConfig
from datapipe.core.errors import NotFoundError, RefusedError, StorageError, UserError
from datapipe.storage.retry import PassingFault, keep_trying
from datapipe.storage.store import TEMPORARY, Children, Data, Entry, Store

T = TypeVar("T")

WHOLE_PUTS = {"memory", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Schemes whose puts are whole or absent by themselves; elsewhere a temporary name is written and moved."""
NETWORK = {
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}


class FsspecStore(Store):
    """A store on any fsspec file system. It has no conditional writes: create-once is a look followed by a write."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.scheme = url.partition("://")[0]

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        def fetch() -> bytes:
            end = None if size is None else start + size
            data: bytes = self._system.cat_file(self._path(name), start=start, end=end)
            if size is None or len(data) != size:
                self._refuse_cut(name, start, size, len(data))
            return data

        return self._try(fetch, name)

    def _refuse_cut(self, name: str, start: int, size: int | None, length: int) -> None:
        """Not every file system of fsspec compares what arrives with what was announced."""
        total = self._system.info(self._path(name)).get("size")
        if total is not None and length != max(0, min(total - start, size if size is not None else total)):
            raise ConnectionError(f"{length} bytes from {start} on came of an object of {total}")

    def size(self, name: str) -> int:
        facts = self._try(lambda: self._system.info(self._path(name)), name)
        if facts["type"] == "directory":
            raise self._absent(name)
        return int(facts["size"])

    def list(self, prefix: str = "", *, enter: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        root = self._path("").rstrip("/") + "/"

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            return self._system.find(root, detail=True) if self._system.exists(root) else {}

        details = self._try(find, "")
        for path in sorted(details):
            name = path[path.index(root.strip("/")) + len(root.strip("/")) + 1 :]
            if name.startswith(prefix) and not name.endswith(TEMPORARY):
                yield Entry(name, int(details[path]["size"]))

    def children(self) -> Children:
        root = self._path("").rstrip("/") + "/"

        def look() -> list[dict[str, Any]]:
            self._system.invalidate_cache()
            found: list[dict[str, Any]] = self._system.ls(root, detail=True) if self._system.exists(root) else []
            return found

        folders: set[str] = set()
        files: set[str] = set()
        for facts in self._try(look, ""):
            name = facts["name"].rstrip("/").rpartition("/")[2]
            (folders if facts["type"] == "directory" else files).add(name)
        return Children(sorted(folders), sorted(name for name in files if not name.endswith(TEMPORARY)))

    def put_if_absent(self, name: str, data: Data) -> bool:
        self.replace(name, data)
        return True

    def replace(self, name: str, data: Data) -> None:
        self.refuse_outside(name)
        final = self._path(name)
        target = final if self.scheme in WHOLE_PUTS else f"{final}.{secrets.token_hex(6)}{TEMPORARY}"

        def write() -> None:
            self._system.makedirs(final.rpartition("/")[0], exist_ok=True)
            self.permit()
            if isinstance(data, Path):
                self._system.put_file(str(data), target)
            else:
                self._system.pipe_file(target, bytes(data))
            if target != final:
                self.permit()
                self._system.mv(target, final)

        self._try(write, name)

    def delete(self, name: str) -> None:
        self.refuse_outside(name)

        def remove() -> None:
            self.permit()
            if self._system.exists(self._path(name)):
                self._system.rm_file(self._path(name))

        self._try(remove, name)

    def at(self, *parts: str) -> Store:
        for part in parts:
            self.refuse_outside(part)
        return FsspecStore("/".join((self.url, *parts)), self.config)

    @property
    def _system(self) -> Any:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"no way to open {self.scheme}:// addresses: {error}",
                where=self.url,
                hint="install fsspec's package for this scheme, or use a path or s3://",
            ) from error

    def _path(self, name: str) -> str:
        path = self._system._strip_protocol(self.url)
        return f"{path}/{name}" if name else path

    def _try(self, request: Callable[[], T], name: str) -> T:
        def attempt() -> T:
            try:
                return request()
            except UserError:
                raise
            except Exception as error:  # every file system raises classes of its own libraries
                raise self._explained(error, name) from error

        return keep_trying(attempt, self.config, where=self.address(name))

    def _explained(self, error: Exception, name: str) -> Exception:
        if isinstance(error, FileNotFoundError):
            cause = error.__cause__
            if not isinstance(cause, Exception) or _is_absence(cause):
                return self._absent(name)
            error = cause  # http's file system says "not found" of everything that goes wrong
        if not isinstance(error, OSError) and isinstance(error, (TypeError, ValueError, AttributeError, RuntimeError)):
            return error
        where = self.address(name)
        if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
            return RefusedError(f"the store refuses access: {error}", where=where, hint="check credentials and rights")
        hint = "check the address, the rights and the network"
        final = StorageError(f"the store refused: {error or type(error).__name__}", where=where, hint=hint)
        return PassingFault(final) if _is_passing(error) else final

    def _absent(self, name: str) -> NotFoundError:
        return NotFoundError("the file does not exist", where=self.address(name), hint="check the address")


def _is_absence(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | LookupError) or getattr(error, "status", None) in (404, 410)


def _is_passing(error: Exception) -> bool:
    """The network's failures and servers that are busy; not what a file system of this machine refuses."""
    status = getattr(error, "status", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, OSError) or error.errno is None or error.errno in NETWORK
