"""Versions of a data set that take the place of all those in use, row for row, without some of the crops."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.parallel import Workers
from datapipe.core.progress import Progress
from datapipe.dataset.index import MARKS, RowMarks, Shard
from datapipe.dataset.manifest import ORDINAL, Manifest
from datapipe.maintain.relink_duplicates import relink_duplicates
from datapipe.maintain.rewrite_shards import Change, rewrite, stand_in
from datapipe.storage import Store

Shards = tuple[Shard, ...]


class _Renewed(NamedTuple):
    shards: Shards
    removed: int
    """Rows without a crop of their own, in all."""


def in_use(versions: Sequence[Manifest]) -> list[Manifest]:
    """The versions of a folder whose place no other version has taken."""
    replaced = {identity for version in versions for identity in version.replaces}
    return [version for version in versions if version.id not in replaced]


def replace_versions(
    store: Store,
    keys: pyarrow.Array,
    derived_by: str,
    storage: StorageConfig,
    workers: Workers,
    *,
    mend: Collection[str] = (),
    mended: Mapping[Shard, Shard] | None = None,
) -> list[Manifest]:
    """Save a successor of each version in use that holds one of these crops; returns all successors, oldest first.

    `mend`: tars that are damaged and written anew as well. `mended`: shards that others have already taken the place
    of. Raises DataError where no crop would be left. Versions that were replaced before, by a run that was killed,
    are left alone; new versions that others save meanwhile are replaced too.
    """
    done: dict[Shards, _Renewed] = {}
    while True:
        versions = list(Manifest.versions(store))
        for version in in_use(versions):
            if version.shards not in done:
                done[version.shards] = _renew(store, version, keys, storage, workers, mend, mended or {})
            renewed = done[version.shards]
            done[renewed.shards] = renewed
            if renewed.shards != version.shards:
                version.derive(store, derived_by, shards=renewed.shards, removed=renewed.removed)
                break
        else:
            return [version for version in in_use(versions) if version.derived_by == derived_by]


def _renew(
    store: Store,
    version: Manifest,
    keys: pyarrow.Array,
    storage: StorageConfig,
    workers: Workers,
    mend: Collection[str],
    mended: Mapping[Shard, Shard],
) -> _Renewed:
    repaired = tuple(mended.get(shard, shard) for shard in version.shards)
    whole = dataclasses.replace(version, selection=None, shards=repaired)
    table = whole.table(["key", "dhash", *MARKS, "removed", ORDINAL], storage)
    present = ~table["removed"].to_numpy()
    selected = pyarrow.compute.is_in(table["key"], value_set=keys).to_numpy()
    out = present & selected
    staying = present & ~selected
    if not staying.any():
        raise DataError("no crop would be left", where=store.url, hint="delete the folder instead")
    if not out.any() and not mend:
        return _Renewed(whole.shards, int((~present).sum()))
    starts = np.cumsum([0, *(shard.rows for shard in whole.shards)])
    marks = relink_duplicates(table, staying, keys)
    changes = dict(_changes(whole.shards, starts, out, staying, marks, mend))
    shards = list(whole.shards)
    with Progress("rewrite", max(1, len(changes))) as progress:
        tasks = ((store, shards[ordinal], change) for ordinal, change in changes.items())
        for ordinal, shard in zip(changes, workers.run(rewrite, tasks, count=len(changes)), strict=True):
            shards[ordinal] = shard
            progress.advance(1, f"{shard.rows:,} rows")
    _fill_empty(store, shards, starts, staying)
    return _Renewed(tuple(shards), int((~staying).sum()))


def _changes(
    shards: Shards,
    starts: np.ndarray,
    out: np.ndarray,
    staying: np.ndarray,
    marks: Mapping[int, RowMarks],
    mend: Collection[str],
) -> Iterator[tuple[int, Change]]:
    """What is to be done to each shard that changes and keeps a crop."""
    marked = np.array(sorted(marks), np.int64)
    for ordinal, shard in enumerate(shards):
        low, high = starts[ordinal : ordinal + 2].tolist()
        going = np.flatnonzero(out[low:high])
        inside = marked[(marked >= low) & (marked < high)].tolist()
        new = {row - low: marks[row] for row in inside}
        if staying[low:high].any() and (len(going) or new or shard.name in mend):
            yield ordinal, Change(going, new, shard.name in mend)


def _fill_empty(store: Store, shards: list[Shard], starts: np.ndarray, staying: np.ndarray) -> None:
    """Shards of which nothing is left hold the place of crops of the next one that has any."""
    alive = [ordinal for ordinal in range(len(shards)) if staying[starts[ordinal] : starts[ordinal + 1]].any()]
    for ordinal in sorted(set(range(len(shards))) - set(alive)):
        host = next((other for other in alive if other > ordinal), alive[0])
        shards[ordinal] = stand_in(store, shards[ordinal], shards[host])
