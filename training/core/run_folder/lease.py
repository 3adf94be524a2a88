"""One writer a run folder: the lease that a run holds on it, with a term that rises with every takeover.

    lease/0000007.holder.json    who holds term 7; created once, never changed
    lease/0000007.renewed.json   its last sign of life, or that it gave the lease back

A term is taken by creating its first file, which only one can. It ends when it is given back; on the same machine when
the process is gone, or was stopped past its duration; elsewhere when its second file has not changed for the duration
by the watcher's own clock: clocks of machines are never compared. A holder that has not renewed for most of the
duration, by a clock that counts suspension, asks the store before it writes on; a later term means that it was taken
over, and it ends. Readers need none of this.
"""

import contextlib
import copy
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.config import StorageConfig
from datapipe.core.errors import LeaseError, NotFoundError, StorageError
from datapipe.core.stop_signals import at_end
from datapipe.storage import Store, full_url, is_remote, open_store
from training.core.run_folder.lease_holder import Holder, boottime
from training.core.run_folder.run_folder import RunFolder
from training.core.run_folder.write_guard import Ticket, WriteGuard

log = logging.getLogger(__name__)

FOLDER = "lease"
DURATION_S = 12.0
"""Seconds without a renewal after which others may take over; what recipes say in `cluster.lease_s`."""
HOLDS, RENEWS = 0.75, 0.2
"""Parts of the duration: so long a holder counts on a renewal; so often it renews."""
FOLLOWS, LOOKS = 0.25, 0.1
"""Parts of the duration for the holder's workers: so long one counts on its last look, so often it looks."""
LOOK_S = 0.25
"""Seconds between looks at a lease that may have ended."""
SETTLE_S = 2.0
"""Seconds after which a claim is read back where the store does not refuse to overwrite it."""
_TERM = re.compile(rf"(?:{FOLDER}/(\d{{7,}})\.holder\.json|checkpoints/term_(\d{{7,}})\.json)")


class _NewestTerm(NamedTuple):
    """The newest term that a folder has."""

    term: int
    """0: none."""
    holder: Holder | None
    """Who holds the lease; None: the claim cannot be read."""


class _Kept(WriteGuard):
    """A guard that a thread keeps up to date."""

    def __init__(self, store: Store, ticket: Ticket, *, counts_s: float, every_s: float) -> None:
        self._store, self.ticket, self.term = store, ticket, ticket.term
        self._counts_s, self._every_s = counts_s, every_s
        self._valid_until = -1.0
        self._lost: LeaseError | None = None
        self._ended, self._busy = threading.Event(), threading.RLock()

    @property
    def lost(self) -> LeaseError | None:
        return self._lost

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost
        if boottime() >= self._valid_until:
            self.confirm()

    def confirm(self) -> None:
        with self._busy:
            if boottime() >= self._valid_until:
                self._refresh()
            else:
                self._look()

    def _refresh(self) -> None:
        """Ask the store, and count on its answer for a while from now on."""
        requested_at = boottime()
        self._look()
        self._valid_until = requested_at + self._counts_s

    def _look(self) -> list[int]:
        """The terms that there are. Raises LeaseError where one is later, or this one is somebody else's."""
        if self._lost is not None:
            raise self._lost
        terms = _terms(self._store)
        newest = max(terms, default=0)
        own = self.ticket
        if newest > own.term or (not own.conditional and _overwritten(self._store, own)):
            self._lost = _lost(self._store, newest, own)
            raise self._lost
        return terms

    def _start(self) -> None:
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def _keep(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                with self._busy:
                    if not self._ended.is_set():
                        self._refresh()
            except LeaseError:
                return  # told by the next write
            except StorageError:
                continue  # a write asks for itself once it must


class Lease(_Kept):
    """The lease as its holder has it; a context manager that gives it back."""

    def __init__(self, store: Store, ticket: Ticket, holder: Holder, *, settled_at: float, made: bool) -> None:
        """`settled_at`: `boottime` when nobody writes any more on behalf of the holder before. `made`: the run folder
        was not there before."""
        super().__init__(copy.copy(store), ticket, counts_s=HOLDS * holder.duration_s,
                         every_s=RENEWS * holder.duration_s)  # fmt: skip
        self._requested_at = boottime()
        self._store.permit = self._still
        self.holder, self._settled_at, self._made, self._count = holder, settled_at, made, 0
        self._refresh()
        self._start()

    def settle(self) -> None:
        while (left := self._settled_at - boottime()) > 0:
            time.sleep(min(left, LOOK_S))

    def _refresh(self) -> None:
        if boottime() >= self._valid_until and self._count:
            self._look()  # it may have been taken over: then nothing is written
        self._write(released=False)
        requested_at = self._requested_at
        if self.term not in self._look():
            self._store.put_if_absent(_claim_name(self.term), self.ticket.claim)  # somebody deleted it
        self._valid_until = requested_at + self._counts_s

    def _still(self) -> None:
        """Right before a renewal takes effect: a process that is stopped while it renews does not do so later."""
        if boottime() >= self._requested_at + self._counts_s:
            self._look()

    def _write(self, *, released: bool) -> None:
        self._count += 1
        self._requested_at = boottime()
        renewal = {"token": self.holder.token, "count": self._count, "at_s": boottime(), "released": released}
        self._store.replace(_renewal_name(self.term), json.dumps(renewal).encode())

    def release(self) -> None:
        """Give the lease back; it was never there where nothing was written under it."""
        self._ended.set()
        with self._busy, contextlib.suppress(StorageError, LeaseError, OSError):
            self._look()
            self._write(released=True)
            if all(entry.name.startswith(f"{FOLDER}/") for entry in self._store.list()):
                for name in (_claim_name(self.term), _renewal_name(self.term)):
                    self._store.delete(name)
                if self._made:
                    os.rmdir(self._store.url)

    def __enter__(self) -> "Lease":
        self._at_end = at_end(self.release)  # a command that is ended while it starts
        self._at_end.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._at_end.__exit__(None, None, None)
        self.release()


class Follower(_Kept):
    """The lease as a worker has it, whose driver holds it. A context manager."""

    def __init__(self, url: str, storage: StorageConfig, ticket: Ticket) -> None:
        holder = Holder.from_bytes(ticket.claim)
        duration_s = holder.duration_s if holder else DURATION_S
        super().__init__(open_store(url, storage), ticket, counts_s=FOLLOWS * duration_s, every_s=LOOKS * duration_s)
        self._start()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


def lease_on(
    url: str, storage: StorageConfig, duration_s: float = DURATION_S, *, has_workers: bool = False,
    show_line: Callable[[str], None] = partial(print, flush=True),  # noqa: B008
) -> Lease:  # fmt: skip
    """The lease on a run folder, in a context manager. Raises LeaseError where another process has it, at once where
    that can be told, else after `duration_s` of the other one at most.

    `has_workers`: other processes write on behalf of this one. `show_line`: called where there is something to
    wait for.
    """
    RunFolder(url, storage).refuse_unwritable()
    store = open_store(url, storage)
    made = _make(url, store)
    describe = partial(Holder.here, _place(url, store), duration_s=duration_s, has_workers=has_workers)
    while True:
        newest = _newest(store)
        seen = _await_end(store, newest, describe(), show_line)
        if seen is None:
            continue  # another one has claimed it meanwhile
        own = describe()
        # Where the folder of leases was deleted, checkpoints still tell of terms.
        ticket = _claim(store, max(newest.term, *_terms(store, "checkpoints/term_"), 0) + 1, own)
        if ticket is None:
            continue
        _delete_before(store, newest.term)
        settled_at = 0.0
        if newest.holder is not None and not _parsed(seen).get("released"):
            settled_at = boottime() + FOLLOWS * newest.holder.duration_s if newest.holder.has_workers else 0.0
            if _read(store, _renewal_name(newest.term)) != seen:  # it came back before it could know of this claim
                settled_at = boottime() + newest.holder.duration_s
        return Lease(store, ticket, own, settled_at=settled_at, made=made)


def refuse_held(url: str, storage: StorageConfig) -> None:
    """Raises LeaseError where a process of this machine holds the lease; for work that comes before the run itself."""
    store = open_store(url, storage)
    newest, own = _newest(store), Holder.here(_place(url, store), duration_s=DURATION_S, has_workers=False)
    if newest.holder is not None:
        _ended_here(store, newest, own, _read(store, _renewal_name(newest.term)))


def last_renewal(url: str, storage: StorageConfig) -> bytes:
    """The last sign of life of whoever writes to a run folder: it changes every few seconds while one does. Empty: the
    lease was given back, or there never was one."""
    store = open_store(url, storage)
    terms = _terms(store)
    renewal = _read(store, _renewal_name(max(terms))) if terms else b""
    return b"" if _parsed(renewal).get("released") else renewal


def _newest(store: Store) -> _NewestTerm:
    newest = max(_terms(store), default=0)
    return _NewestTerm(newest, Holder.from_bytes(_read(store, _claim_name(newest))) if newest else None)


def _await_end(store: Store, newest: _NewestTerm, own: Holder, show_line: Callable[[str], None]) -> bytes | None:
    """What the term's last sign of life was, once it has ended; None where a later one has begun meanwhile."""
    seen = _read(store, _renewal_name(newest.term))
    if not seen and not _read(store, _claim_name(newest.term)):
        return seen  # nobody's
    if _ended_here(store, newest, own, seen):
        return seen
    holder = newest.holder
    patience_s = holder.duration_s if holder else DURATION_S
    show_line(f"waiting up to {patience_s:.0f} s to see whether it still writes to {store.url}: {_named(holder)}")
    end = boottime() + patience_s
    while True:
        over = boottime() >= end
        now = _read(store, _renewal_name(newest.term))
        if max(_terms(store), default=0) != newest.term:
            return None
        if _parsed(now).get("released"):
            return now
        if now != seen:
            raise _held(store, holder)
        if over:
            return now
        time.sleep(min(LOOK_S, patience_s / 10))


def _ended_here(store: Store, newest: _NewestTerm, own: Holder, seen: bytes) -> bool:
    """Has the term ended, as far as that can be told at once? Raises LeaseError where it has certainly not."""
    holder = newest.holder
    if _parsed(seen).get("released"):
        return True
    if holder is None or not holder.is_beside(own):
        return False
    if holder.lives() and boottime() - _parsed(seen).get("at_s", holder.claimed_s) <= holder.duration_s:
        raise _held(store, holder)
    return True


def _claim(store: Store, term: int, own: Holder) -> Ticket | None:
    """Take the term; None where another process was quicker."""
    name, content = _claim_name(term), own.to_bytes()
    if not store.create(name, content) and _read(store, name) != content:
        return None
    conditional = not store.put_if_absent(name, content)
    if not conditional:
        log.warning("%s does not enforce create-once: of two runs that are started there at the same moment the later "
                    "one stays, and the other one ends when it notices", store.url)  # fmt: skip
        time.sleep(min(SETTLE_S, own.duration_s / 4))
    if _read(store, name) != content:
        return None
    if max(_terms(store)) > term:
        store.delete(name)
        return None
    return Ticket(term, content, conditional)


def _delete_before(store: Store, term: int) -> None:
    """Delete what earlier terms have left."""
    with contextlib.suppress(StorageError):
        for old in _terms(store):
            if old < term:
                store.delete(_renewal_name(old))
                store.delete(_claim_name(old))


def _overwritten(store: Store, own: Ticket) -> bool:
    return _read(store, _claim_name(own.term)) not in (b"", own.claim)


def _terms(store: Store, prefix: str = f"{FOLDER}/") -> list[int]:
    """Numbers of the terms that files below the prefix tell of."""
    try:
        matches = [_TERM.fullmatch(entry.name) for entry in store.list(prefix)]
    except NotFoundError:
        return []
    return [int(match[1] or match[2]) for match in matches if match]


def _claim_name(term: int) -> str:
    return f"{FOLDER}/{term:07d}.holder.json"


def _renewal_name(term: int) -> str:
    return f"{FOLDER}/{term:07d}.renewed.json"


def _read(store: Store, name: str) -> bytes:
    """Empty where there is nothing."""
    try:
        return store.read(name)
    except NotFoundError:
        return b""


def _parsed(renewal: bytes) -> dict[str, Any]:
    try:
        return parse_record(renewal)
    except ValueError:
        return {}


def _place(url: str, store: Store) -> str:
    """The folder itself, by whatever path it is reached: a local one's number on its file system."""
    if is_remote(url):
        return full_url(url)
    with contextlib.suppress(OSError):
        return f"inode {os.stat(store.url).st_ino}"
    return ""


def _make(url: str, store: Store) -> bool:
    """Make a local folder; was it not there before?"""
    if is_remote(url) or os.path.isdir(store.url):
        return False
    with contextlib.suppress(OSError):  # somebody else made it meanwhile, or the claim will tell what is wrong
        os.makedirs(store.url)
        return True
    return False


def _named(holder: Holder | None) -> str:
    return str(holder) if holder else "a process that cannot be identified (its claim is damaged)"


def _held(store: Store, holder: Holder | None) -> LeaseError:
    return LeaseError(
        f"another process writes to this run folder: {_named(holder)}", where=store.url,
        hint="wait for it, stop it there, or choose another folder with --out; when it has died, its lease ends by "
        "itself",
    )  # fmt: skip


def _lost(store: Store, newest: int, own: Ticket) -> LeaseError:
    with contextlib.suppress(StorageError):
        holder = Holder.from_bytes(_read(store, _claim_name(newest)))
        return LeaseError(
            f"the run folder was taken over while this process was stopped or cut off: {_named(holder)} writes there "
            f"now (term {newest}, here {own.term})", where=store.url,
            hint="nothing: this process has written nothing since, and the other one goes on with the run",
        )  # fmt: skip
    return LeaseError("the run folder was taken over by another process", where=store.url)
