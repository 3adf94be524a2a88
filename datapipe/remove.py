"""Take crops out of a data set: out of the stream at once, out of the stored bytes by the end of the command.

    claim -> new tars and indexes -> a new manifest for every version in use -> record -> old objects deleted

Killed at any moment, the same command goes on. Row numbers stay what they were (see rewrite.py), so that training that
is under way and its checkpoints go on with the new versions. The manifests of old versions stay as lineage; the record
says how many crops went, why and when, and which keys by their hashes alone: no names. A bucket that keeps old versions
of its objects still has the bytes until its own rules expire them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from datapipe.cache import default_folder
from datapipe.config import RemoveConfig, StorageConfig
from datapipe.derived import Cleared, Place, clear, look
from datapipe.errors import ConfigError, DataError, NotFoundError, UserError
from datapipe.listed import (
    EXAMPLES,
    By,
    Found,
    canonical,
    look_up,
    read_list,
    refuse_ambiguous,
    refuse_missing,
)
from datapipe.manifest import Manifest
from datapipe.plan_shards import sample_key
from datapipe.quarantine import NAME as QUARANTINE
from datapipe.quarantine import write_quarantine
from datapipe.scan import REFUSED
from datapipe.spool import spool_of
from datapipe.storage import Store, open_store, unsafe
from datapipe.successors import in_use, replace_versions
from datapipe.workers import Workers

RECORDS, CLAIM = "removals/", "removals/begun-"
REWRITTEN = re.compile(r"shards/[0-9a-f]{32}\.(tar|parquet)")
"""Objects that `rewrite` makes. Without a version that refers to them, a run that failed has left them."""
COLUMNS = ["key", "source", "name", "sha256"]


@dataclass(frozen=True)
class Removed:
    """How a removal ended."""

    crops: int
    versions: tuple[str, ...]
    """Files of the versions that took the place of others, oldest first."""
    deleted: int
    """Objects of old versions that were deleted."""
    missing: tuple[str, ...] = ()
    """Some of the listed crops that the data set does not have."""
    missing_count: int = 0
    """How many there are of these."""
    before: int = 0
    """Listed crops that were removed before, or were quarantined and so never in the stream."""
    alike: int = 0
    """Crops that went because their names differ from a listed one's in Unicode's forms or blanks alone."""
    remarks: int = 0
    """Lines of the lists that were taken for headings or comments."""
    copies: int = 0
    """Crops that stay although they are equal, byte for byte, to one that went."""
    found_complete: bool = False
    """Nothing was left to do."""
    cleared: Cleared = field(default_factory=Cleared)
    """What became of copies elsewhere."""


def remove(url: str, config: RemoveConfig, storage: StorageConfig) -> Removed:
    """Remove the crops that meet all criteria from every version of the data set in a folder, and clear the copies in
    `config.runs`.

    Raises ConfigError without a criterion, DataError where no crop is meant, where too many listed ones are not there,
    where none would be left, where another removal was begun, or where a tar is damaged. Nothing is removed then.
    """
    if not (config.source or config.keys or config.names):
        raise ConfigError("nothing says which crops are to go", hint="--source, --keys or --names")
    if url.endswith(".json"):
        raise ConfigError("crops are removed from all versions of a data set", where=url, hint="give the folder")
    Manifest.load(url, storage)
    store = open_store(url, storage)
    refuse_links(store)
    request = _Request.read(config, storage)
    places = look(config.runs, storage)
    with claimed(store, request.id):
        name = f"{RECORDS}{request.id}.json"
        with contextlib.suppress(NotFoundError):
            done = finish(store, name)
            return dataclasses.replace(done, found_complete=True, cleared=_clear(store, places, request.words))
        found = request.find(store, storage)
        if not len(found.keys):
            return found.ended(Removed(0, (), 0, found_complete=True), _clear(store, places, request.words))
        with Workers(config.workers) as workers:
            replace_versions(store, found.keys, "remove", storage, workers)
        _forget_quarantined(store, found)
        cleared = _clear(store, places, request.words | found.words)
        write_record(store, name, found.keys, {"reason": config.reason, "date": config.date})
        return found.ended(finish(store, name), cleared)


def refuse_links(store: Store) -> None:
    """Raises DataError where objects of a local data set are links that lead out of its folder: other files would be
    written there, or the bytes would stay where they are."""
    objects = _objects(list(Manifest.versions(store)))
    name = next(store.linked_out(sorted(objects | {RECORDS.rstrip("/"), "shards", "selections"})), "")
    if name:
        raise DataError("a link leads out of the data set: nothing is written or deleted through it",
                        where=store.address(name), hint="put the files themselves into the folder first")  # fmt: skip


def _clear(store: Store, places: Sequence[Place], words: Collection[str]) -> Cleared:
    """Clear copies elsewhere, and blocks of shards that are no more in the cache of this machine; list what is left."""
    versions = list(Manifest.versions(store))
    kept = {shard.sha256 for version in in_use(versions) for shard in version.shards}
    gone = {shard.sha256 for version in versions for shard in version.shards} - kept
    if os.path.isdir(default_folder()) and os.stat(default_folder()).st_uid == os.getuid():
        places = [*places, *look([default_folder()], StorageConfig())]
    cleared = clear(places, gone, words)
    spool = open_store(spool_of(store.url), StorageConfig())
    with contextlib.suppress(NotFoundError):
        left = sum(1 for _ in spool.list())
        cleared.remaining += [f"{spool.url}: {left:,} files of a `shard` that has not ended"] if left else []
    unfinished = [store.address(name) for name in store.unfinished()]
    cleared.remaining += [f"{address}: half-written by a command that was killed" for address in unfinished]
    return cleared


# ------------------------------------------------------------------------------------------------ which crops are meant


@dataclass(frozen=True)
class _Found:
    keys: pyarrow.Array
    words: frozenset[str]
    """Keys and names of the crops, and what else the lists say."""
    quarantined: frozenset[str]
    """Keys of listed crops that were quarantined."""
    missing: tuple[str, ...] = ()
    missing_count: int = 0
    before: int = 0
    alike: int = 0
    remarks: int = 0
    copies: int = 0

    def ended(self, done: Removed, cleared: Cleared) -> Removed:
        """The same removal with what was found."""
        own = ("missing", "missing_count", "before", "alike", "remarks", "copies")
        return dataclasses.replace(done, cleared=cleared, **{name: getattr(self, name) for name in own})


@dataclass
class _Meant:
    """Which rows of a table are meant, and what the lists hold beside."""

    rows: np.ndarray
    """bool, for each row."""
    missing: list[str] = field(default_factory=list)
    missing_count: int = 0
    before: int = 0
    alike: int = 0
    remarks: int = 0
    quarantined: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Request:
    """Which crops are to go. Equal requests have an equal id, whatever the lists are called."""

    config: RemoveConfig
    lists: Mapping[By, pyarrow.Array]

    @staticmethod
    def read(config: RemoveConfig, storage: StorageConfig) -> "_Request":
        given: tuple[tuple[By, str], ...] = (("key", config.keys), ("name", config.names))
        return _Request(config, {by: read_list(url, by, storage) for by, url in given if url})

    @property
    def id(self) -> str:
        """16 hex digits."""
        lists = {by: sorted(listed.to_pylist()) for by, listed in self.lists.items()}
        facts = json.dumps([self.config.source, self.config.duplicates, lists], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def words(self) -> frozenset[str]:
        """All that the lists say."""
        return frozenset(word for listed in self.lists.values() for word in listed.to_pylist())

    def find(self, store: Store, storage: StorageConfig) -> _Found:
        """The keys of these crops; none where all of them were removed before."""
        table = _crops(store, storage)
        meant = self._meant(table, store)
        if not meant.rows.any() and not meant.before:
            raise DataError(
                "no crop of the data set is meant; one that was removed before is not there any more",
                where=store.url,
                hint="`python -m datapipe stats` lists the sources",
            )
        hashes = table["sha256"].combine_chunks()
        equal = pyarrow.compute.is_in(hashes, value_set=hashes.filter(pyarrow.array(meant.rows)))
        rows, copies = meant.rows, equal.to_numpy(zero_copy_only=False) & ~meant.rows
        if self.config.duplicates:
            rows, copies = rows | copies, copies & False
        chosen = table.filter(pyarrow.array(rows))
        keys = sorted(chosen["key"].to_pylist())
        words = frozenset([*keys, *chosen["name"].to_pylist()]) | self.words
        return _Found(pyarrow.array(keys, pyarrow.string()), words, frozenset(meant.quarantined),
                      tuple(meant.missing[:EXAMPLES]), meant.missing_count, meant.before, meant.alike, meant.remarks,
                      int(copies.sum()))  # fmt: skip

    def _meant(self, table: pyarrow.Table, store: Store) -> _Meant:
        meant = _Meant(pyarrow.compute.equal(table["source"], self.config.source or table["source"]).to_numpy())
        looked = {by: _look_up(listed, table, by, meant.rows) for by, listed in self.lists.items()}
        for found in looked.values():
            meant.rows = meant.rows & (found.place >= 0)
        for by, found in looked.items():
            listed, place = self.lists[by], np.where(meant.rows, found.place, -1)
            meant.alike += refuse_ambiguous(place, listed, table, f"--{by}s")
            lost = self._but_gone(found, by, table, store, meant)
            lost += listed.take(np.setdiff1d(found.place, [-1, *np.unique(place).tolist()])).to_pylist()
            found = found._replace(missing=len(lost), examples=lost[:EXAMPLES])
            refuse_missing(found, len(listed), share=self.config.max_missing, where=getattr(self.config, f"{by}s"))
            meant.missing, meant.missing_count = meant.missing + lost[:EXAMPLES], meant.missing_count + len(lost)
            meant.remarks += found.remarks
        return meant

    def _but_gone(self, found: Found, by: By, table: pyarrow.Table, store: Store, meant: _Meant) -> list[str]:
        """The listed crops that are not there, but for those that were removed before or quarantined: noted."""
        if not len(found.lost):
            return []
        hashes, sources = _removed_before(store), table["source"].unique().to_pylist()
        refused = look_up(found.lost, _quarantined(store, self.config.source), by)
        meant.quarantined |= {key for key, place in zip(_quarantined(store, self.config.source)["key"].to_pylist(),
                                                        refused.place.tolist(), strict=True) if place >= 0}  # fmt: skip
        unknown = set(refused.lost.to_pylist())
        lost = []
        for line in found.lost.to_pylist():
            keys = [line.strip().lower()] if by == "key" else _keys_of(line, sources)
            if line not in unknown or any(hashlib.sha256(key.encode()).hexdigest() in hashes for key in keys):
                meant.before += 1
            else:
                lost.append(line)
        return lost


def _look_up(listed: pyarrow.Array, table: pyarrow.Table, by: By, among: np.ndarray) -> Found:
    """`look_up` among some of the rows (bool) of a table."""
    found = look_up(listed, table.filter(pyarrow.array(among)), by)
    place = np.full(len(table), -1)
    place[among] = found.place
    return found._replace(place=place)


def _keys_of(name: str, sources: Sequence[str]) -> list[str]:
    """The keys that crops of this name would have had."""
    name = canonical(pyarrow.array([name], pyarrow.large_string()), "name")[0].as_py()
    spellings = {name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))}
    return [sample_key(source, spelling) for source in sources for spelling in spellings]


def _quarantined(store: Store, source: str) -> pyarrow.Table:
    """quarantine.parquet, or what it holds of one source."""
    try:
        data = store.read(QUARANTINE)
    except NotFoundError:
        return REFUSED.empty_table()
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    return table.filter(pyarrow.compute.equal(table["source"], source)) if source else table


def _forget_quarantined(store: Store, found: _Found) -> None:
    """Take the rows out of quarantine.parquet that are of listed crops or name a removed one as their original."""
    table = _quarantined(store, "")
    gone = pyarrow.array([*found.keys.to_pylist(), *found.quarantined], pyarrow.string())
    named = [pyarrow.compute.is_in(table[name], value_set=gone) for name in ("key", "detail")]
    left = table.filter(pyarrow.compute.invert(pyarrow.compute.or_(*named)))
    if len(left) < len(table):
        write_quarantine(store, [left])


def _crops(store: Store, storage: StorageConfig) -> pyarrow.Table:
    """COLUMNS of every crop of the versions in use, and of those that a killed run has already replaced."""
    done = _replaced(store)
    shards = {version.shards: version for version in Manifest.versions(store) if version.id not in done}
    parts = [
        dataclasses.replace(version, selection=None).table([*COLUMNS, "removed"], storage)
        for version in shards.values()
    ]
    table = pyarrow.concat_tables(parts)
    table = table.filter(pyarrow.compute.invert(table["removed"])).select(COLUMNS)
    return table.group_by(COLUMNS, use_threads=False).aggregate([]) if len(parts) > 1 else table


# --------------------------------------------------------------------------------------------- claim, record, the end


@contextlib.contextmanager
def claimed(store: Store, identity: str) -> Iterator[None]:
    """Keep other removals and repairs away until this one has ended: also when it is killed and not run again.

    Raises DataError where another one has begun. A run that fails before it has replaced a version gives its claim up.
    """
    mine = CLAIM + identity
    store.create(mine, b"{}\n")
    others = [entry.name for entry in store.list(CLAIM) if entry.name != mine]
    try:
        if others:
            raise DataError(
                "another removal or repair was begun and has not ended",
                where=store.address(others[0]),
                hint="wait for it; if it was killed, run the same command again and then this one",
            )
        yield
    except UserError:
        if others or not unfinished(store):
            store.delete(mine)
        raise
    store.delete(mine)


def write_record(store: Store, name: str, keys: pyarrow.Array, about: Mapping[str, Any]) -> None:
    """Say for good what went, and what is to be deleted now: all that no version in use refers to."""
    using = in_use(list(Manifest.versions(store)))
    old = unfinished(store)
    kept = _objects(using)
    made = {entry.name for entry in store.list("shards/") if REWRITTEN.fullmatch(entry.name)}
    replaced = {version.id: other.file for version in old for other in using if version.id in other.replaces}
    record = {
        "format": 1,
        "count": len(keys),
        **about,
        "replaced": replaced,
        "deleted": sorted((_objects(old) | made) - kept),
        "keys_sha256": [hashlib.sha256(key.encode()).hexdigest() for key in keys.to_pylist()],
    }
    store.create(name, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def finish(store: Store, name: str) -> Removed:
    """Delete what the record says. Raises NotFoundError where there is no record yet."""
    record = _record(store, name)
    present = {entry.name for entry in store.list()}
    going = [old for old in record["deleted"] if old in present]
    for old in going:
        store.delete(old)
    return Removed(record["count"], tuple(sorted(set(record["replaced"].values()))), len(going))


def unfinished(store: Store) -> list[Manifest]:
    """Versions that were replaced by a removal that has no record yet."""
    versions = list(Manifest.versions(store))
    done, using = _replaced(store), in_use(versions)
    return [version for version in versions if version not in using and version.id not in done]


def _records(store: Store) -> list[dict[str, Any]]:
    names = [entry.name for entry in store.list(RECORDS) if not entry.name.startswith(CLAIM)]
    return [_record(store, name) for name in names]


def _record(store: Store, name: str) -> dict[str, Any]:
    """A record. Raises DataError where it is damaged, or tells to delete what is no object of shards."""
    data = store.read(name)
    try:
        record: dict[str, Any] = json.loads(data)
        wrong = next((old for old in record["deleted"] if unsafe(old) or not old.endswith((".tar", ".parquet"))), None)
        files = record["replaced"].values()
        if type(record["count"]) is not int or any(unsafe(file) for file in files) or wrong is not None:
            raise ValueError(f"it names {wrong!r}" if wrong is not None else "a number or a name is none")
        record["keys_sha256"] = frozenset(record["keys_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the record of a removal is damaged: {error!r}", where=store.address(name),
                        hint="copy it again") from error  # fmt: skip
    return record


def _removed_before(store: Store) -> frozenset[str]:
    """sha256 of the keys of all crops that finished removals took out."""
    return frozenset[str]().union(*(record["keys_sha256"] for record in _records(store)))


def _replaced(store: Store) -> set[str]:
    """Ids of the versions whose objects finished removals have deleted, or are to delete."""
    return {identity for record in _records(store) for identity in record["replaced"]}


def _objects(versions: Sequence[Manifest]) -> set[str]:
    return {name for version in versions for shard in version.shards for name in (shard.name, shard.index)}
