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
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.config import RemoveConfig, StorageConfig
from datapipe.errors import ConfigError, DataError, NotFoundError, UserError
from datapipe.listed import By, look_up, read_list, refuse_ambiguous
from datapipe.manifest import Manifest
from datapipe.storage import Store, open_store
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
    copies: int = 0
    """Crops that stay although they are equal, byte for byte, to one that went."""
    found_complete: bool = False
    """Nothing was left to do."""


def remove(url: str, config: RemoveConfig, storage: StorageConfig) -> Removed:
    """Remove the crops that meet all criteria from every version of the data set in a folder.

    Raises ConfigError without a criterion, DataError where no crop is meant, where none would be left, where another
    removal was begun, or where a tar is damaged.
    """
    if not (config.source or config.keys or config.names):
        raise ConfigError("nothing says which crops are to go", hint="--source, --keys or --names")
    if url.endswith(".json"):
        raise ConfigError("crops are removed from all versions of a data set", where=url, hint="give the folder")
    Manifest.load(url, storage)
    store = open_store(url, storage)
    request = _Request.read(config, storage)
    with claimed(store, request.id):
        name = f"{RECORDS}{request.id}.json"
        with contextlib.suppress(NotFoundError):
            return dataclasses.replace(finish(store, name), found_complete=True)
        found = request.find(store, storage)
        with Workers(config.workers) as workers:
            replace_versions(store, found.keys, "remove", storage, workers)
        write_record(store, name, found.keys, {"reason": config.reason, "date": config.date})
        return dataclasses.replace(finish(store, name), missing=found.missing, copies=found.copies)


# ------------------------------------------------------------------------------------------------ which crops are meant


@dataclass(frozen=True)
class _Found:
    keys: pyarrow.Array
    missing: tuple[str, ...]
    copies: int


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

    def find(self, store: Store, storage: StorageConfig) -> _Found:
        """The keys of these crops."""
        table = _crops(store, storage)
        meant, missing = self._meant(table)
        if not meant.any():
            raise DataError(
                "no crop of the data set is meant; one that was removed before is not there any more",
                where=store.url,
                hint="`python -m datapipe stats` lists the sources",
            )
        hashes = table["sha256"].combine_chunks()
        equal = pyarrow.compute.is_in(hashes, value_set=hashes.filter(pyarrow.array(meant)))
        copies = equal.to_numpy(zero_copy_only=False) & ~meant
        if self.config.duplicates:
            meant, copies = meant | copies, copies & False
        keys = pyarrow.array(sorted(table["key"].filter(pyarrow.array(meant)).to_pylist()), pyarrow.string())
        return _Found(keys, missing, int(copies.sum()))

    def _meant(self, table: pyarrow.Table) -> tuple[np.ndarray, tuple[str, ...]]:
        meant = np.ones(len(table), bool)
        if self.config.source:
            meant = pyarrow.compute.equal(table["source"], self.config.source).to_numpy()
        missing: list[str] = []
        for by, listed in self.lists.items():
            found = look_up(listed, table, by)
            meant = meant & (found.place >= 0)
            refuse_ambiguous(found.place[meant], listed, f"--{by}s")
            missing += found.examples
        return meant, tuple(missing)


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
    record = json.loads(store.read(name))
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


def _replaced(store: Store) -> set[str]:
    """Ids of the versions whose objects finished removals have deleted, or are to delete."""
    records = [entry.name for entry in store.list(RECORDS) if not entry.name.startswith(CLAIM)]
    return {identity for name in records for identity in json.loads(store.read(name))["replaced"]}


def _objects(versions: Sequence[Manifest]) -> set[str]:
    return {name for version in versions for shard in version.shards for name in (shard.name, shard.index)}
