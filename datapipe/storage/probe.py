"""What a store can do, found out by doing it, before a run that writes begins its work."""

import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass, fields

from datapipe.core.errors import RefusedError, StorageError
from datapipe.storage.store import Store, WrongRangeError

log = logging.getLogger(__name__)

CONTENT = b"0123456789 written by datapipe to see what this store can do; may be deleted"
SPAN = slice(3, 11)


@dataclass(frozen=True)
class Capabilities:
    """What was seen. Writing itself works, or there would be no result."""

    creates_once: bool
    """The store refuses a second `put_if_absent`, whole or in parts. Says nothing about races: no store's word for
    them is relied on."""
    ranges: bool
    """Exactly the bytes that were asked for come back."""
    lists: bool
    """What was written is listed at once."""
    deletes: bool
    """What was written can be deleted."""

    def demand(self, *names: str, where: str) -> None:
        """Raise StorageError unless the store has all the capabilities of these names."""
        lacking = [field.name for field in fields(self) if field.name in names and not getattr(self, field.name)]
        if lacking:
            raise StorageError(
                f"the store lacks what this command needs: {', '.join(WORDS[name] for name in lacking)}",
                where=where,
                hint="give the credentials the right to do so, or use another store",
            )


WORDS = {
    "creates_once": "create-once puts",
    "ranges": "exact range reads",
    "lists": "listing (at once) what was written",
    "deletes": "deleting objects",
}


def probe(store: Store) -> Capabilities:
    """Write, overwrite, read, list and delete an object of a random name; only that name is touched.

    Raises StorageError where nothing can be written: no rights, no bucket, a read-only folder, a wrong endpoint. Warns
    in one line where create-once is not enforced.
    """
    name = f".probe-{secrets.token_hex(8)}"
    try:
        store.put_if_absent(name, CONTENT)
        ranges, lists = _serves_ranges(store, name), _lists(store, name)
        creates_once = store.refuses_overwrite(name)
    except BaseException:
        with suppress(StorageError):  # what failed first is what the user should read
            store.delete(name)
        raise
    if not creates_once:
        log.warning("%s does not enforce create-once: let one run at a time write a data set there", store.url)
    return Capabilities(creates_once=creates_once, ranges=ranges, lists=lists, deletes=_deletes(store, name))


def _serves_ranges(store: Store, name: str) -> bool:
    try:
        return store.read(name, start=SPAN.start, size=SPAN.stop - SPAN.start) == CONTENT[SPAN]
    except WrongRangeError:
        return False


def _lists(store: Store, name: str) -> bool:
    try:
        return any(entry.name == name for entry in store.list(name))
    except RefusedError:
        return False


def _deletes(store: Store, name: str) -> bool:
    try:
        store.delete(name)
    except RefusedError:
        return False
    return not store.exists(name)
