"""Take crops out of a data set: out of the stream at once, out of the stored bytes by the end of the command.

    claim -> new tars and indexes -> a new manifest for every version in use -> record -> old objects deleted
          -> packed indexes of the new versions

Killed at any moment, the same command goes on. Row numbers stay what they were (see `rewrite`), so that training that
is under way and its checkpoints go on with the new versions. The manifests of old versions stay as lineage; the record
says how many crops went, why and when, and which keys by their hashes alone: no names. A bucket that keeps old versions
of its objects still has the bytes until its own rules expire them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import RemoveConfig, StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.core.parallel import Workers
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import ensure_packed
from datapipe.dataset.quarantine import REFUSED, read_quarantine, read_remarks, write_quarantine
from datapipe.ingest.shard_plan import sample_key
from datapipe.ingest.spool import spool_of
from datapipe.maintain.crop_lists import (
    EXAMPLES,
    By,
    ListMatch,
    canonical,
    look_up,
    read_list,
    refuse_ambiguous,
    refuse_missing,
)
from datapipe.maintain.derived_copies import Cleared, CopyLocation, clear, look
from datapipe.maintain.removal_records import (
    RECORDS,
    exclusive_change,
    finish,
    refuse_links,
    removed_before,
    replaced_versions,
    write_record,
)
from datapipe.maintain.replace_versions import in_use, replace_versions
from datapipe.storage import Store, open_store
from datapipe.stream.disk_cache import default_folder

COLUMNS = ["key", "source", "name", "sha256"]


@dataclass
class ListCounts:
    """What the lists of crops held, beside the crops that go."""

    missing: list[str] = field(default_factory=list)
    """Some of the listed crops that the data set does not have."""
    missing_count: int = 0
    """How many there are of these."""
    before: int = 0
    """Listed crops that were removed before, or were quarantined and so never in the stream."""
    alike: int = 0
    """Crops that go because their names differ from a listed one's in Unicode's forms or blanks alone."""
    remarks: int = 0
    """Lines of the lists that were taken for headings or comments."""
    copies: int = 0
    """Crops that stay although they are equal, byte for byte, to one that goes."""


@dataclass(frozen=True)
class Removed:
    """How a removal ended."""

    crops: int
    versions: tuple[str, ...]
    """Files of the versions that took the place of others, oldest first."""
    deleted: int
    """Objects of old versions that were deleted."""
    found_complete: bool = False
    """Nothing was left to do."""
    cleared: Cleared = field(default_factory=Cleared)
    """What became of copies elsewhere."""
    lists: ListCounts = field(default_factory=ListCounts)


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
    with exclusive_change(store, request.id):
        name = f"{RECORDS}{request.id}.json"
        with contextlib.suppress(NotFoundError):
            done = finish(store, name)
            _pack(store, done.versions, storage)
            return Removed(*done, found_complete=True, cleared=_clear(store, places, request.words))
        selected = request.find(store, storage)
        if not len(selected.keys):
            cleared = _clear(store, places, request.words)
            return Removed(0, (), 0, found_complete=True, cleared=cleared, lists=selected.lists)
        with Workers(config.workers) as workers:
            replace_versions(store, selected.keys, "remove", storage, workers)
        _forget_quarantined(store, selected)
        cleared = _clear(store, places, request.words | selected.words)
        write_record(store, name, selected.keys, {"reason": config.reason, "date": config.date})
        done = finish(store, name)
        _pack(store, done.versions, storage)
        return Removed(*done, cleared=cleared, lists=selected.lists)


def _pack(store: Store, files: Collection[str], storage: StorageConfig) -> None:
    """Write the packed indexes of the versions with these files that are in use."""
    for version in in_use(list(Manifest.versions(store))):
        if version.file in files:
            ensure_packed(version, storage)


def _clear(store: Store, places: Sequence[CopyLocation], words: Collection[str]) -> Cleared:
    """Clear copies elsewhere, and blocks of shards and packed indexes of versions that are no more in the cache of this
    machine; list what is left."""
    versions = list(Manifest.versions(store))
    using = in_use(versions)
    kept = {shard.sha256 for version in using for shard in version.shards}
    replaced = {version.id for version in versions} - {version.id for version in using}
    gone = {shard.sha256 for version in versions for shard in version.shards} - kept
    if os.path.isdir(default_folder()) and os.stat(default_folder()).st_uid == os.getuid():
        places = [*places, *look([default_folder()], StorageConfig())]
    cleared = clear(places, gone, words, removed_before(store), replaced)
    spool = open_store(spool_of(store.url), StorageConfig())
    with contextlib.suppress(NotFoundError):
        left = sum(1 for _ in spool.list())
        cleared.remaining += [f"{spool.url}: {left:,} files of a `shard` that has not ended"] if left else []
    unfinished = [store.address(name) for name in store.unfinished()]
    cleared.remaining += [f"{address}: half-written by a command that was killed" for address in unfinished]
    return cleared


# ------------------------------------------------------------------------------------------------ which crops are meant


@dataclass(frozen=True)
class _Removal:
    keys: pyarrow.Array
    words: frozenset[str]
    """Keys and names of the crops, and what else the lists say."""
    quarantined: frozenset[str]
    """Keys of listed crops that were quarantined."""
    lists: ListCounts


@dataclass
class _Selected:
    """Which rows of a table are meant, and what the lists hold beside."""

    rows: np.ndarray
    """bool, for each row."""
    lists: ListCounts = field(default_factory=ListCounts)
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

    def find(self, store: Store, storage: StorageConfig) -> _Removal:
        """The keys of these crops; none where all of them were removed before."""
        table = _crops(store, storage)
        selected = self._select(table, store)
        if not selected.rows.any() and not selected.lists.before:
            raise DataError(
                "no crop of the data set is meant; one that was removed before is not there any more",
                where=store.url,
                hint="`python -m datapipe stats` lists the sources",
            )
        hashes = table["sha256"].combine_chunks()
        equal = pyarrow.compute.is_in(hashes, value_set=hashes.filter(pyarrow.array(selected.rows)))
        rows, copies = selected.rows, equal.to_numpy(zero_copy_only=False) & ~selected.rows
        if self.config.duplicates:
            rows, copies = rows | copies, copies & False
        chosen = table.filter(pyarrow.array(rows))
        keys = sorted(chosen["key"].to_pylist())
        words = frozenset([*keys, *chosen["name"].to_pylist()]) | self.words
        lists = dataclasses.replace(selected.lists, missing=selected.lists.missing[:EXAMPLES], copies=int(copies.sum()))
        return _Removal(pyarrow.array(keys, pyarrow.string()), words, frozenset(selected.quarantined), lists)

    def _select(self, table: pyarrow.Table, store: Store) -> _Selected:
        selected = _Selected(pyarrow.compute.equal(table["source"], self.config.source or table["source"]).to_numpy())
        looked = {by: _look_up(listed, table, by, selected.rows) for by, listed in self.lists.items()}
        for lookup in looked.values():
            selected.rows = selected.rows & (lookup.place >= 0)
        for by, lookup in looked.items():
            listed, place = self.lists[by], np.where(selected.rows, lookup.place, -1)
            selected.lists.alike += refuse_ambiguous(place, listed, table, f"--{by}s")
            lost = self._but_gone(lookup, by, table, store, selected)
            lost += listed.take(np.setdiff1d(lookup.place, [-1, *np.unique(place).tolist()])).to_pylist()
            lookup = lookup._replace(missing=len(lost), examples=lost[:EXAMPLES])
            refuse_missing(lookup, len(listed), share=self.config.max_missing, where=getattr(self.config, f"{by}s"))
            selected.lists.missing += lost[:EXAMPLES]
            selected.lists.missing_count += len(lost)
            selected.lists.remarks += lookup.remarks
        return selected

    def _but_gone(
        self, lookup: ListMatch, by: By, table: pyarrow.Table, store: Store, selected: _Selected
    ) -> list[str]:
        """The listed crops that are not there, but for those that were removed before or quarantined: noted."""
        if not len(lookup.lost):
            return []
        hashes, sources = removed_before(store), table["source"].unique().to_pylist()
        refused = look_up(lookup.lost, _quarantined(store, self.config.source), by)
        selected.quarantined |= {key for key, place in zip(_quarantined(store, self.config.source)["key"].to_pylist(),
                                                        refused.place.tolist(), strict=True) if place >= 0}  # fmt: skip
        unknown = set(refused.lost.to_pylist())
        lost = []
        for line in lookup.lost.to_pylist():
            keys = [line.strip().lower()] if by == "key" else _keys_of(line, sources)
            if line not in unknown or any(hashlib.sha256(key.encode()).hexdigest() in hashes for key in keys):
                selected.lists.before += 1
            else:
                lost.append(line)
        return lost


def _look_up(listed: pyarrow.Array, table: pyarrow.Table, by: By, among: np.ndarray) -> ListMatch:
    """`look_up` among some of the rows (bool) of a table."""
    lookup = look_up(listed, table.filter(pyarrow.array(among)), by)
    place = np.full(len(table), -1)
    place[among] = lookup.place
    return lookup._replace(place=place)


def _keys_of(name: str, sources: Sequence[str]) -> list[str]:
    """The keys that crops of this name would have had."""
    name = canonical(pyarrow.array([name], pyarrow.large_string()), "name")[0].as_py()
    spellings = {name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))}
    return [sample_key(source, spelling) for source in sources for spelling in spellings]


def _quarantined(store: Store, source: str) -> pyarrow.Table:
    """quarantine.parquet, or what it holds of one source."""
    table = read_quarantine(store)
    if table is None:
        return REFUSED.empty_table()
    return table.filter(pyarrow.compute.equal(table["source"], source)) if source else table


def _forget_quarantined(store: Store, removed: _Removal) -> None:
    """Take the rows out of quarantine.parquet that are of listed crops or name a removed one as their original."""
    table = _quarantined(store, "")
    gone = pyarrow.array([*removed.keys.to_pylist(), *removed.quarantined], pyarrow.string())
    named = [pyarrow.compute.is_in(table[name], value_set=gone) for name in ("key", "detail")]
    left = table.filter(pyarrow.compute.invert(pyarrow.compute.or_(*named)))
    if len(left) < len(table):
        write_quarantine(store, [left], read_remarks(store))


def _crops(store: Store, storage: StorageConfig) -> pyarrow.Table:
    """COLUMNS of every crop of the versions in use, and of those that a killed run has already replaced."""
    done = replaced_versions(store)
    shards = {version.shards: version for version in Manifest.versions(store) if version.id not in done}
    parts = [
        dataclasses.replace(version, selection=None).table([*COLUMNS, "removed"], storage)
        for version in shards.values()
    ]
    table = pyarrow.concat_tables(parts)
    table = table.filter(pyarrow.compute.invert(table["removed"])).select(COLUMNS)
    return table.group_by(COLUMNS, use_threads=False).aggregate([]) if len(parts) > 1 else table
