"""Mend what can be mended of a data set, and name what cannot.

A damaged or missing index whose tar is intact is rebuilt from the tar: byte for byte where the tar holds sidecars,
otherwise in a new version in which names and labels are unknown. Damaged crops are taken out of all versions as
`remove` does it, and what surrounds the sound ones in a tar is written anew. Packed indexes that are missing or wrong
are made anew.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow
import xxhash

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.core.parallel import Workers
from datapipe.dataset.index import Shard, read_index
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import ensure_packed
from datapipe.maintain.rebuild_index import members, rebuild
from datapipe.maintain.removal_records import RECORDS, exclusive_change, finish, refuse_links, unfinished, write_record
from datapipe.maintain.replace_versions import in_use, replace_versions
from datapipe.maintain.rewrite_shards import stand_in
from datapipe.storage import Store, open_store


class Diagnosis(NamedTuple):
    """What is wrong with one shard."""

    lost_index: bool = False
    """The shard's index is missing or damaged."""
    damaged_tar: bool = False
    missing_tar: bool = False
    damaged: tuple[str, ...] = ()
    """Keys of crops whose bytes are not what they were; known where the index is good."""


@dataclass
class Repaired:
    """What was done, and what could not be done."""

    rebuilt: list[str] = field(default_factory=list)
    """Indexes as they were."""
    unlabelled: list[str] = field(default_factory=list)
    """Indexes rebuilt without names and labels."""
    mended: list[str] = field(default_factory=list)
    """Tars written anew."""
    removed: int = 0
    """Damaged crops taken out."""
    hopeless: list[str] = field(default_factory=list)
    """What is wrong for good, and where."""

    def lines(self) -> Iterator[str]:
        """For people."""
        yield from (f"rebuilt {name}" for name in self.rebuilt)
        yield from (f"rebuilt {name}: original names, sources and labels are unknown" for name in self.unlabelled)
        yield from (f"mended {name}" for name in self.mended)
        if self.removed:
            yield f"{self.removed:,} damaged crops taken out"
        yield from (f"cannot be repaired: {what}" for what in self.hopeless)


def repair(url: str, storage: StorageConfig, *, workers: int = 0) -> Repaired:
    """Mend a data set, all its versions. Reads every byte. Killed at any moment, it is simply run again."""
    if url.endswith(".json"):
        raise ConfigError("all versions of a data set are repaired together", where=url, hint="give the folder")
    Manifest.load(url, storage)
    store = open_store(url, storage)
    refuse_links(store)
    done = Repaired()
    with exclusive_change(store, "repair"), Workers(workers) as pool:
        versions = in_use(list(Manifest.versions(store)))
        using, past = _shards(versions), _shards(unfinished(store))
        shards = list(dict.fromkeys([*using, *past]))
        results = pool.run(diagnose, ((store, shard) for shard in shards), count=len(shards))
        diagnoses = dict(zip(shards, results, strict=True))
        done.hopeless += [f"{shard.name} is missing" for shard in using if diagnoses[shard].missing_tar]
        successors = _mend_indexes(store, versions, diagnoses, done)
        if any(diagnoses[shard].lost_index and shard not in successors for shard in using):
            return done  # versions cannot be replaced while rows of them are unknown
        keys = pyarrow.array(sorted({key for what in diagnoses.values() for key in what.damaged}), pyarrow.string())
        done.mended += sorted({shard.name for shard, what in diagnoses.items() if what.damaged_tar})
        done.removed = len(keys)
        changed = {old: new for old, new in successors.items() if new != old}
        if changed or done.mended or past:
            replace_versions(store, keys, "repair", storage, pool, mend=done.mended, mended=changed)
            facts = repr([done.mended, keys.to_pylist()])
            name = f"{RECORDS}repair-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
            write_record(store, name, keys, {"reason": "damaged", "date": ""})
            finish(store, name)
        for version in in_use(list(Manifest.versions(store))):
            ensure_packed(version, storage, mend=True)
    return done


def _shards(versions: Iterable[Manifest]) -> list[Shard]:
    """The shards of all these versions, each once."""
    return list(dict.fromkeys(shard for version in versions for shard in version.shards))


def diagnose(store: Store, shard: Shard) -> Diagnosis:
    """Look at every byte of one shard."""
    try:
        rows = read_index(store, shard, ("key", "offset", "size", "xxh3", "removed")).to_pylist()
    except DataError:
        rows = None
    try:
        tar = store.read(shard.name)
    except NotFoundError:
        return Diagnosis(rows is None, missing_tar=True)
    if hashlib.sha256(tar).hexdigest() == shard.sha256:
        return Diagnosis(rows is None)
    damaged = tuple(
        row["key"]
        for row in rows or ()
        if not row["removed"]
        and xxhash.xxh3_64_intdigest(memoryview(tar)[row["offset"] : row["offset"] + row["size"]]) != row["xxh3"]
    )
    return Diagnosis(rows is None, damaged_tar=True, damaged=damaged)


def _mend_indexes(
    store: Store, versions: Iterable[Manifest], diagnoses: Mapping[Shard, Diagnosis], done: Repaired
) -> dict[Shard, Shard]:
    """The shards whose indexes were lost, and what takes their place: themselves where all bytes are back."""
    successors: dict[Shard, Shard] = {}
    for version in versions:
        good = {number: shard for number, shard in enumerate(version.shards) if not diagnoses[shard].lost_index}
        for ordinal, shard in enumerate(version.shards):
            if not diagnoses[shard].lost_index or shard in successors:
                continue
            host = _host(store, shard, good.values())
            if host:
                successors[shard] = stand_in(store, shard, host)
                done.rebuilt.append(shard.index)
            elif diagnoses[shard].damaged_tar or diagnoses[shard].missing_tar:
                done.hopeless.append(f"{shard.index}: the tar it would be rebuilt from is not intact either")
            elif len(members(store.read(shard.name))) != shard.rows:
                done.hopeless.append(f"{shard.index}: only it knew which of its {shard.rows:,} rows had a crop removed")
            else:
                successors[shard], labelled = rebuild(store, shard, ordinal, good)
                (done.rebuilt if labelled else done.unlabelled).append(shard.index)
    return successors


def _host(store: Store, shard: Shard, others: Iterable[Shard]) -> Shard | None:
    """Where all crops of a shard were removed: the one whose crops its rows hold the place of."""
    for other in others:
        if other.name == shard.name and not all(read_index(store, other, ["removed"])["removed"].to_pylist()):
            return other
    return None
