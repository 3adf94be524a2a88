"""Any URL scheme that fsspec knows."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datapipe.errors import NotFoundError, StorageError
from datapipe.storage.store import TEMPORARY, Data, Entry, Store

WHOLE_PUTS = {"memory", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Schemes whose puts are whole or absent by themselves; elsewhere a temporary name is written and moved."""


class SchemeStore(Store):
    """Any URL scheme that fsspec knows. Create-once is a look followed by a write: enough for one committer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition("://")[0]

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        with self._faults(name):
            return self._system.cat_file(self._path(name), start=start, end=None if size is None else start + size)

    def size(self, name: str) -> int:
        with self._faults(name):
            facts = self._system.info(self._path(name))
            if facts["type"] == "directory":
                raise FileNotFoundError(name)
            return int(facts["size"])

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = self._path("").rstrip("/") + "/"
        with self._faults(""):
            self._system.invalidate_cache()
            found = self._system.find(root, detail=True) if self._system.exists(root) else {}
        for path in sorted(found):
            name = path[path.index(root.strip("/")) + len(root.strip("/")) + 1 :]
            if name.startswith(prefix) and not name.endswith(TEMPORARY):
                yield Entry(name, int(found[path]["size"]))

    def create(self, name: str, data: Data) -> bool:
        if self.exists(name):
            return False
        self.replace(name, data)
        return True

    def replace(self, name: str, data: Data) -> None:
        final = self._path(name)
        target = final if self.scheme in WHOLE_PUTS else f"{final}.{secrets.token_hex(6)}{TEMPORARY}"
        with self._faults(name):
            self._system.makedirs(final.rpartition("/")[0], exist_ok=True)
            if isinstance(data, Path):
                self._system.put_file(str(data), target)
            else:
                self._system.pipe_file(target, bytes(data))
            if target != final:
                self._system.mv(target, final)

    def delete(self, name: str) -> None:
        with self._faults(name):
            if self._system.exists(self._path(name)):
                self._system.rm_file(self._path(name))

    def at(self, *parts: str) -> Store:
        return SchemeStore("/".join((self.url, *parts)))

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

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(
                "the file does not exist", where=self.address(name), hint="check the address"
            ) from error
        except OSError as error:
            raise StorageError(
                f"the store refused: {error}",
                where=self.address(name),
                hint="check the address, the rights and the network",
            ) from error
