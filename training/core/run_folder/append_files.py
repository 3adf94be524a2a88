"""Files that change all the time, on a store that cannot append, as object stores cannot."""

import logging
import threading
import time

from datapipe.core.errors import LeaseError, NotFoundError, UserError
from datapipe.storage import Store

log = logging.getLogger(__name__)

FLUSH_S = 20.0
"""From a line to the file that has it, at most, as long as writing is quick."""
REST = 20.0
"""Times as long as writing took, nothing is written: a file of many MB is written more seldom."""


class GrowingFiles:
    """Keeps files that only this process writes. A thread of its own writes them anew at intervals, so that nobody who
    has something to add waits for the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._contents: dict[str, bytearray] = {}
        self._unread: set[str] = set()
        """Files whose earlier content, which goes before what is in `_contents`, has not been fetched yet."""
        self._changed: set[str] = set()
        self._kept, self._writing = threading.Lock(), threading.Lock()
        self._due, self._hurry = threading.Event(), threading.Event()
        self._writer: threading.Thread | None = None

    def append(self, name: str, line: str) -> None:
        """Add a line to a file, after what was there before."""
        with self._kept:
            if name not in self._contents:
                self._contents[name] = bytearray()
                self._unread.add(name)
            self._contents[name] += line.encode() + b"\n"
            self._change(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file at once, in place of what was to be written of it. Raises StorageError."""
        with self._writing:
            with self._kept:
                self._changed.discard(name)
                self._unread.discard(name)
                if name in self._contents:
                    self._contents[name] = bytearray(content)
            self._store.replace(name, content)

    def replace(self, name: str, content: bytes, *, hurry: bool = False) -> None:
        """What the file is to hold from now on, and nothing else. `hurry`: it is written without delay, as all else
        that has changed."""
        with self._kept:
            self._contents[name] = bytearray(content)
            self._unread.discard(name)
            self._change(name)
        if hurry:
            self._hurry.set()

    def flush(self) -> None:
        """Returns when all that was given by now is on the store. Raises StorageError: it is not, but none of it is
        lost as long as this process lives."""
        with self._writing:
            with self._kept:
                names = sorted(self._changed)
                self._changed.clear()
            try:
                for name in names:
                    self._store.replace(name, self._content(name))
            except BaseException:
                with self._kept:
                    self._changed.update(names)
                raise

    def _content(self, name: str) -> bytes:
        """All that the file is to hold by now."""
        before = self._present(name) if name in self._unread else b""
        with self._kept:
            if name in self._unread:
                self._contents[name][:0] = before
                self._unread.discard(name)
            return bytes(self._contents[name])

    def _change(self, name: str) -> None:
        self._changed.add(name)
        self._due.set()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_at_intervals, name="growing files", daemon=True)
            self._writer.start()

    def _write_at_intervals(self) -> None:
        took_s = 0.0
        while True:
            self._due.wait()
            self._hurry.wait(max(FLUSH_S, REST * took_s))
            self._due.clear()
            self._hurry.clear()
            began = time.monotonic()
            try:
                self.flush()
            except LeaseError:
                return  # another process writes these files from now on
            except UserError as error:  # all is kept, and a save that needs it on the store says so itself
                log.warning("not written now, will be tried again: %s (%s)", error.what, error.where)
                self._due.set()
            took_s = time.monotonic() - began

    def _present(self, name: str) -> bytes:
        try:
            return self._store.read(name)
        except NotFoundError:
            return b""
