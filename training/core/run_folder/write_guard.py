"""The permission to write to a run folder, asked for before each write."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from datapipe.core.errors import LeaseError
from datapipe.storage import Children, Data, Entry, Store


class WriteGuard:
    """Who may write. This one lets everybody: for folders that nobody else writes to. Those that know are in
    `training/core/run_folder/lease.py`."""

    term: int = 0
    """Number of the lease, which rises with every takeover; 0 without one."""

    @property
    def lost(self) -> LeaseError | None:
        """Why this process may not write any more, as far as it knows; asks nobody."""
        return None

    def check(self) -> None:
        """Returns where this process may write now. Asks the store only when the last answer may have run out.

        Raises LeaseError where another process has taken over, StorageError where the store does not tell.
        """

    def confirm(self) -> None:
        """Raise as `check`, and ask the store in any case: before what must not happen behind a successor's back."""

    def settle(self) -> None:
        """Return once nobody who wrote on behalf of the holder before can write any more."""


FREE = WriteGuard()


class GuardedStore(Store):
    """A store that asks a guard before each write, and again right before the write takes effect."""

    def __init__(self, store: Store, guard: WriteGuard) -> None:
        self.url, self._store, self._guard = store.url, copy.copy(store), guard
        self._store.permit = guard.check

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        return self._store.read(name, start=start, size=size)

    def size(self, name: str) -> int:
        return self._store.size(name)

    def list(self, prefix: str = "", *, enter: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        return self._store.list(prefix, enter=enter)

    def children(self) -> Children:
        return self._store.children()

    def put_if_absent(self, name: str, data: Data) -> bool:
        self._guard.check()
        return self._store.put_if_absent(name, data)

    def replace(self, name: str, data: Data) -> None:
        self._guard.check()
        self._store.replace(name, data)

    def delete(self, name: str) -> None:
        self._guard.check()
        self._store.delete(name)

    def delete_many(self, names: Iterable[str]) -> None:
        self._guard.check()
        self._store.delete_many(names)

    def at(self, *parts: str) -> Store:
        return GuardedStore(self._store.at(*parts), self._guard)

    def unfinished(self) -> Iterator[str]:
        return self._store.unfinished()


class Ticket(NamedTuple):
    """What a worker must know of the lease that another process holds. Picklable."""

    term: int
    claim: bytes
    """What the holder's claim says."""
    conditional: bool
    """Does the store refuse to overwrite a claim?"""
