"""Records of removals and repairs, and the claim that keeps others away until one has ended.

removals/begun-<id>            claim: a removal or repair is under way
removals/<id>.json             what went, why and when; which objects of old versions are to be deleted
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError, UserError
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import of_version
from datapipe.maintain.replace_versions import in_use
from datapipe.storage import Store, unsafe

MOST_RECORD_BYTES = 8 << 30
"""Of a record: each crop that went takes 70 of them."""
RECORDS, CLAIM = "removals/", "removals/begun-"
REWRITTEN = re.compile(r"shards/[0-9a-f]{32}\.(tar|parquet)")
"""Objects that `rewrite` makes. Without a version that refers to them, a run that failed has left them."""


def refuse_links(store: Store) -> None:
    """Raises DataError where objects of a local data set are links that lead out of its folder: other files would be
    written there, or the bytes would stay where they are."""
    objects = _objects(list(Manifest.versions(store)))
    name = next(store.linked_out(sorted(objects | {RECORDS.rstrip("/"), "shards", "selections"})), "")
    if name:
        raise DataError("a link leads out of the data set: nothing is written or deleted through it",
                        where=store.address(name), hint="put the files themselves into the folder first")  # fmt: skip


@contextlib.contextmanager
def exclusive_change(store: Store, identity: str) -> Iterator[None]:
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


class Finished(NamedTuple):
    """What a record says of a removal, and what was deleted."""

    crops: int
    versions: tuple[str, ...]
    """Files of the versions that took the place of others, oldest first."""
    deleted: int
    """Objects of old versions that were deleted."""


def finish(store: Store, name: str) -> Finished:
    """Delete what the record says, and packed indexes of the versions that were replaced. Raises NotFoundError where
    there is no record yet."""
    record = _record(store, name)
    present = {entry.name for entry in store.list()}
    going = [old for old in record["deleted"] if old in present]
    going += [old for old in sorted(present) if any(of_version(old, version) for version in record["replaced"])]
    for old in going:
        store.delete(old)
    return Finished(record["count"], tuple(sorted(set(record["replaced"].values()))), len(going))


def unfinished(store: Store) -> list[Manifest]:
    """Versions that were replaced by a removal that has no record yet."""
    versions = list(Manifest.versions(store))
    done, using = replaced_versions(store), in_use(versions)
    return [version for version in versions if version not in using and version.id not in done]


def _records(store: Store) -> list[dict[str, Any]]:
    names = [entry.name for entry in store.list(RECORDS) if not entry.name.startswith(CLAIM)]
    return [_record(store, name) for name in names]


def _record(store: Store, name: str) -> dict[str, Any]:
    """A record. Raises DataError where it is damaged, or tells to delete what is no object of shards."""
    data = store.read_small(name, MOST_RECORD_BYTES, what="the record of a removal")
    try:
        record = parse_record(data)
        wrong = next((old for old in record["deleted"] if unsafe(old) or not old.endswith((".tar", ".parquet"))), None)
        files = record["replaced"].values()
        if type(record["count"]) is not int or any(unsafe(file) for file in files) or wrong is not None:
            raise ValueError(f"it names {wrong!r}" if wrong is not None else "a number or a name is none")
        keys = record["keys_sha256"]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its keys are none")
        record["keys_sha256"] = frozenset(keys)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the record of a removal is damaged: {error!r}", where=store.address(name),
                        hint="copy it again") from error  # fmt: skip
    return record


def removed_before(store: Store) -> frozenset[str]:
    """sha256 of the keys of all crops that finished removals took out."""
    return frozenset[str]().union(*(record["keys_sha256"] for record in _records(store)))


def replaced_versions(store: Store) -> set[str]:
    """Ids of the versions whose objects finished removals have deleted, or are to delete."""
    return {identity for record in _records(store) for identity in record["replaced"]}


def _objects(versions: Sequence[Manifest]) -> set[str]:
    return {name for version in versions for shard in version.shards for name in (shard.name, shard.index)}
