"""What a store is: names relative to a folder or prefix, bytes, and the promises that every kind keeps.

Names are '/'-separated. What `create` and `replace` write is whole under its name or not there at all; a reader never
meets half an object. Every fault becomes a `StorageError` that names the address.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError, NotFoundError, StorageError

Data = bytes | bytearray | memoryview | Path
"""What can be written: bytes in memory, or a local file that is streamed."""

MOST_RECORD_BYTES = 64 << 20
"""Of a JSON file that is read as a whole."""
TEMPORARY = ".part"
"""Ending of files that are still being written; listings leave them out."""


CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DRIVE = re.compile(r"[A-Za-z]:")


class Entry(NamedTuple):
    """One file or object: its name within the store and its size in bytes."""

    name: str
    size: int


class Children(NamedTuple):
    """What lies right below a folder or prefix: names, sorted, without what is below its folders."""

    folders: list[str]
    files: list[str]


class WrongRangeError(StorageError):
    """The store answered a request for a range with other bytes."""


def unsafe(name: object) -> str:
    """Why this is no plain name below a folder, as names read from files have to be; empty where it is one.

    Plain names are "/"-separated, and mean the same on every system: not absolute, no "." or "..", no empty part, no
    drive letter, no backslash, no control character.
    """
    if not isinstance(name, str) or not name:
        return "it is empty" if name == "" else "it is no text"
    if name.startswith(("/", "~")) or DRIVE.match(name):
        return "it is absolute"
    if "\\" in name or CONTROL.search(name):
        return "it holds a backslash or a control character"
    parts = name.split("/")
    if ".." in parts:
        return "it leads out of its folder"
    return "it has an empty part" if "" in parts or "." in parts else ""


def leads_out(name: str) -> bool:
    """Whether a name within a store is one of something outside of it."""
    return name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/"))


class Store(ABC):
    """One folder or prefix. Cheap to make, safe to share between threads, picklable."""

    url: str
    permit: Callable[[], None] = staticmethod(lambda: None)
    """Called right before what makes an object, replaces or deletes it; nothing is done where it raises. The data may
    have been sent by then, under no name yet."""

    @abstractmethod
    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Bytes [start, start + size) of an object; fewer only where it ends. Raises NotFoundError."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object. Raises NotFoundError."""

    @abstractmethod
    def list(self, prefix: str = "", *, enter: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        """Everything below whose name starts with `prefix`, sorted by name, as it is found.

        Folders of which `enter` says False need not be looked into; stores that know no folders list them all the same.

        Raises NotFoundError where the folder or bucket itself is missing; an S3 prefix without objects is just empty.
        """

    @abstractmethod
    def children(self) -> Children:
        """Folders and files right below, in one request for a thousand of them, however much there is in the folders.
        Raises NotFoundError as `list`."""

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

    def delete_many(self, names: Iterable[str]) -> None:
        """Remove objects, in no order, in as few requests as the store allows; those that are absent are fine. Raises
        StorageError where one could not be removed; others may be gone by then."""
        names = tuple(names)
        for name in names:
            self.refuse_outside(name)
        for name in names:
            self.delete(name)

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

    def create_by_content(self, name: str, data: bytes | bytearray) -> None:
        """Write an object whose name follows from its content. One that is there with other bytes is damaged, and is
        replaced."""
        if not self.create(name, data) and self.read(name) != data:
            self.replace(name, data)

    def read_small(self, name: str, most: int, *, what: str = "a file", hint: str = "copy it again") -> bytes:
        """A whole object of at most so many bytes. Raises DataError for a larger one, without having read it, and
        NotFoundError."""
        data = self.read(name, start=0, size=most + 1)
        if len(data) > most:
            raise DataError(f"{what} has more than {most:,} bytes", where=self.address(name), hint=hint)
        return data

    def read_record(self, name: str, *, what: str = "a file", hint: str = "copy it again") -> dict[str, Any]:
        """An object that is JSON, an object of it. Raises NotFoundError, and DataError where it is damaged."""
        data = self.read_small(name, MOST_RECORD_BYTES, what=what, hint=hint)
        try:
            return parse_record(data)
        except ValueError as error:
            raise DataError(f"{what} is damaged: {error}", where=self.address(name), hint=hint) from error

    def read_verified(self, name: str, sha256: str, *, what: str, hint: str) -> bytes:
        """A whole object, compared with its sha256 (hex). Raises DataError, with `what` the object is and a hint, where
        it is missing or not what was written."""
        try:
            data = self.read(name)
        except NotFoundError as error:
            raise DataError(f"{what} is missing", where=self.address(name), hint=hint) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{what} is not the one that was written", where=self.address(name), hint=hint)
        return data

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

    def refuse_outside(self, name: str) -> None:
        """Raises StorageError for a name that leads out of the folder or prefix: no object of this store has it."""
        if leads_out(name):
            hint = "names are relative to the folder, without `..`; who wrote the file that holds this one?"
            raise StorageError(f"the name {name!r} leads out of the folder", where=self.url, hint=hint)

    def linked_out(self, names: Iterable[str]) -> Iterator[str]:
        """The names that links on the file system lead out of the folder. Object stores have no links."""
        yield from ()

    def address(self, name: str) -> str:
        """The full path or URL of an object, for messages."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def unfinished(self) -> Iterator[str]:
        """Names of what writers that were killed left half-written here, which `list` leaves out. Those that are still
        at it are among them. Object stores have none."""
        yield from ()
