"""Data sets -> one new data set: merged, split anew, in shards of other sizes. No JPEG is decoded or encoded.

    manifests -> rows of their indexes -> plan -> rows of each shard -> shards (tar, then index)
              -> quarantine.parquet -> manifest -> packed index

The plan and the writer are those of `shard`; the crops come from the tars of the old data sets, checked as they are
copied. Duplicates are marked anew, across what was merged. Killed anywhere, the same command goes on.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import ReshardConfig, ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.parallel import Executor, Workers
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import Manifest, libraries, load_unselected
from datapipe.dataset.packed_index import ensure_packed
from datapipe.dataset.quarantine import excluded, read_quarantine, read_remarks, write_quarantine
from datapipe.dataset.remarks import Remarks
from datapipe.dataset.tar import member_bytes
from datapipe.ingest.ownership import claim_output, is_written
from datapipe.ingest.pipeline import refuse_inside, write_shards
from datapipe.ingest.repartition import planned, repartition
from datapipe.ingest.shard_plan import Candidates, Plan, hot_columns, key_texts, plan_shards, ranked
from datapipe.ingest.shard_writer import sidecars
from datapipe.ingest.spool import opened_spool
from datapipe.storage import Store, open_store

KEPT = tuple(name for name in INDEX.names if name not in ("offset", "duplicate_of", "near_of", "removed"))
"""Columns that a crop takes along; the others are made anew."""


@dataclass(frozen=True)
class Resharded:
    """How a run ended."""

    manifest: Manifest
    found_complete: bool
    """Nothing was left to do."""
    repeated: int = 0
    """Crops that several of the data sets had, and that are in the new one once."""
    selections: tuple[Manifest, ...] = ()
    """The data sets that were selections of rows: their other crops were not taken."""


def reshard(
    urls: Sequence[str],
    out: str,
    config: ReshardConfig,
    storage: StorageConfig,
    *,
    licence: str = "",
    workers: Executor | None = None,
) -> Resharded:
    """Make a data set of the crops of others, or finish what an earlier run began. Removed crops are not taken along.

    Raises DataError where a data set is missing or damaged, where two of them have different crops under one key, and
    where `out` holds another data set.
    """
    refuse_inside(urls, out)
    sets = [Manifest.load(url, storage) for url in urls]
    store = open_store(out, storage)
    with opened_spool(config.spool, out, storage) as (spool, local), Workers(config.workers) as own:
        request = _request(sets, config, licence)
        if is_written(store, request, out):
            whole = load_unselected(out, storage)
            ensure_packed(whole, storage)
            return Resharded(whole, True)
        run = _Resharding(sets, store, spool, local, config, storage, workers or own)
        crops, plan = run.plan()
        claim_output(store, request)
        repartition(plan, crops, run.rows(), spool, local=local)
        refused, repeated = run.quarantine(plan, crops), int((~run.once).sum())
        del crops
        manifest = Manifest(
            write_shards(plan, store, spool, storage, run.workers, with_sidecars=config.sidecars == "json"),
            name="+".join(sorted({part.name for part in sets})),
            plan=plan.id,
            licence=licence or "; ".join(sorted({part.licence for part in sets} - {""})),
            notes=tuple(dict.fromkeys(note for part in sets for note in part.notes)),
            quarantined=refused,
            made_by=libraries(),
        ).save(store)
        ensure_packed(manifest, storage)
        return Resharded(manifest, False, repeated, tuple(part for part in sets if part.selection))


def _request(sets: Sequence[Manifest], config: ReshardConfig, licence: str) -> bytes:
    """What a data set is made from; the order of the sets decides whose labels a crop has that is in several."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("workers", "spool")}
    sources = {f"{number}: {part.name} {part.id[:12]}": part.id for number, part in enumerate(sets)}
    record = {"format": 2, "licence": licence, "settings": settings, "sources": sources}
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


class _Resharding:
    """The steps of one run."""

    def __init__(
        self,
        sets: Sequence[Manifest],
        store: Store,
        spool: Store,
        local: Path | None,
        config: ReshardConfig,
        storage: StorageConfig,
        workers: Executor,
    ) -> None:
        self.sets, self.store, self.spool, self.local = sets, store, spool, local
        self.config, self.storage, self.workers = config, storage, workers
        self.once = np.ones(sum(part.rows for part in sets), bool)
        """For each crop of all sets whether it goes into the new one: not if an earlier one has its key."""

    def plan(self) -> tuple[Candidates, Plan]:
        """What goes where. DataError where two crops have one key and different bytes."""
        crops, count = Candidates.room(len(self.once)), 0
        for rows in self.rows():
            crops.put(count, self._hot(rows))
            count += rows.num_rows
        crops = _some(crops, np.arange(count))
        self.once = once(crops)
        crops = _some(crops, np.flatnonzero(self.once))
        return crops, plan_shards(crops, _shard_config(self.config))

    def rows(self) -> Iterator[pyarrow.Table]:
        """The crops with the columns of PLANNED besides `place` and the marks, shard by shard."""
        start = 0
        for part in self.sets:
            store = open_store(part.url, self.storage)
            for ordinal, table in part.tables((*KEPT, "offset", "removed"), self.storage):
                table = table.filter(pyarrow.compute.invert(table["removed"]))
                end = start + len(table)
                table = table.filter(pyarrow.array(self.once[start:end]))
                url = pyarrow.repeat(pyarrow.scalar(store.address(part.shards[ordinal].name)), len(table))
                yield table.append_column("url", url).append_column("start", table["offset"])
                start = end

    def quarantine(self, plan: Plan, crops: Candidates) -> int:
        """Bring the lists of what was left out together, with what this plan leaves out; returns how many."""
        rows = planned(plan, crops, self.rows()) if self.config.exclude != "none" else ()
        remarks = Remarks()
        for part in self.sets:
            remarks.add(read_remarks(open_store(part.url, self.storage)))
        refused = chain(self._refused(), excluded(rows))
        return sum(write_quarantine(self.store, refused, remarks, local=self.local).values())

    def _hot(self, rows: pyarrow.Table) -> pyarrow.Table:
        """The columns that Candidates take."""
        taken = member_bytes(rows["size"].to_numpy())
        if self.config.sidecars == "json" and len(rows):
            taken += member_bytes(np.array([len(text) for text in sidecars(rows)]))
        hot = hot_columns(rows, taken, seed=self.config.seed, near_within=self.config.near_within)
        for name in ("key", "sha256", "dhash"):
            hot = hot.append_column(name, rows[name])
        return hot

    def _refused(self) -> Iterator[pyarrow.Table]:
        for part in self.sets:
            refused = read_quarantine(open_store(part.url, self.storage))
            if refused is not None:
                yield refused


def once(crops: Candidates) -> np.ndarray:
    """For each crop, whether no earlier one has its key. Raises DataError where one has it with other bytes."""
    order = ranked(crops)  # equal keys have equal ranks, and so are neighbours
    keys, content = crops.key[order], crops.content[order]
    same = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1)) + 1
    different = same[(content[same] != content[same - 1]).any(axis=1)]
    if len(different):
        key = key_texts(keys[different[:1]])[0]
        raise DataError(
            f"{len(different):,} crops have the same source and name, and different bytes",
            where=f"key {key}",
            hint="shard the sources again, under names that tell them apart",
        )
    group = np.arange(len(order))
    group[same] = 0
    group = np.maximum.accumulate(group)
    first = np.full(len(order), len(order))
    np.minimum.at(first, group, order)
    is_first = np.zeros(len(order), bool)
    is_first[first[first < len(order)]] = True
    return is_first


def _some(crops: Candidates, rows: np.ndarray) -> Candidates:
    names = [field.name for field in dataclasses.fields(crops)]
    return Candidates(**{name: getattr(crops, name)[rows] for name in names})


def _shard_config(config: ReshardConfig) -> ShardConfig:
    return ShardConfig(**dataclasses.asdict(config))
