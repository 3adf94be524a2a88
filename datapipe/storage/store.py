"""What a store is: names relative to a folder or prefix, bytes, and the promises that every kind keeps.

Names are '/'-separated. What `create` and `replace` write is whole under its name or not there at all; a reader never
meets half an object. Every fault becomes a `StorageError` that names the address.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datapipe.errors import NotFoundError, StorageError

Data = bytes | bytearray | memoryview | Path
"""What can be written: bytes in memory, or a local file that is streamed."""

TEMPORARY = ".part"
"""Ending of files that are still being written; listings leave them out."""


class Entry(NamedTuple):
    """One file or object: its name within the store and its size in bytes."""

    name: str
    size: int


class WrongRangeError(StorageError):
    """The store answered a request for a range with other bytes."""


class Store(ABC):
    """One folder or prefix. Cheap to make, safe to share between threads, picklable."""

    url: str

    @abstractmethod
    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Bytes [start, start + size) of an object; fewer only where it ends. Raises NotFoundError."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object. Raises NotFoundError."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Everything below whose name starts with `prefix`, sorted by name, as it is found.

        Raises NotFoundError where the folder or bucket itself is missing; an S3 prefix without objects is just empty.
        """

    @abstractmethod
    def put_if_absent(self, name: str, data: Data) -> bool:
        """Write an object unless the store itself finds the name in use; False, and nothing written, when it does.

        A store that knows no such condition, or ignores it, overwrites and says True: see `create` and `probe`.
        """

    @abstractmethod
    def replace(self, name: str, data: Data) -> None:
        """Write an object whether it is there or not."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; one that is absent is fine."""

    @abstractmethod
    def at(self, *parts: str) -> "Store":
        """The store of a sub-folder."""

    def create(self, name: str, data: Data) -> bool:
        """Write an object that is not there yet; False, and nothing written, when it is.

        No lock: where the store ignores conditions, two writers at the very same moment may both be told True, and
        the later object stays, whole. So the name of what is created must follow from its content, or the writers
        must claim the place first. False may also mean that a try of this very call had succeeded and its answer was
        lost: compare the content.
        """
        return not self.exists(name) and self.put_if_absent(name, data)

    def refuses_overwrite(self, name: str) -> bool:
        """Whether `put_if_absent` on an object that is there is refused. Overwrites it if not: for `probe`."""
        return not self.put_if_absent(name, b"overwritten")

    def exists(self, name: str) -> bool:
        """Whether an object of this name is there."""
        try:
            self.size(name)
        except NotFoundError:
            return False
        return True

    def address(self, name: str) -> str:
        """The full path or URL of an object, for messages."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def unfinished(self) -> Iterator[str]:
        """Names of what writers that were killed left half-written here, which `list` leaves out. Those that are still
        at it are among them. Object stores have none."""
        yield from ()
