"""A local folder for many small reads: its files stay open."""

import os
import resource
from threading import Lock

from datapipe.storage.local import LocalStore, _read_fully
from datapipe.storage.store import Store

MOST_OPEN = 512
"""Files kept open, or a quarter of what the process may have open if that is less."""


class KeptStore(LocalStore):
    """Opening and closing cost half of a small read. A file that was deleted or replaced since is opened anew: it has
    no name left, which the descriptor tells."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MOST_OPEN if allowed == resource.RLIM_INFINITY else min(MOST_OPEN, allowed // 4)
        self._lock = Lock()
        self._files: dict[str, _File] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return KeptStore, (self.url,)

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if size is not None:
            try:
                file = self._files.get(name)  # as a rule it is there, and no lock is needed
                if file is None or file.gone():
                    file = self._open(name)
                data = os.pread(file.number, size, start)
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
