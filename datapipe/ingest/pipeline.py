"""One run of `shard`: list, scan, plan, repartition, write, commit. Killed anywhere, the same command goes on.

    sources -> units -> scan (spool) -> plan -> rows of each shard -> shards (tar, then index)
            -> quarantine.parquet -> manifest -> packed index

What is done is decided here and in pure functions; the tasks, which read and write pixels, are carried out by workers,
on this machine or on others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.parallel import Executor, Workers
from datapipe.core.progress import Progress, counted
from datapipe.dataset.index import Shard
from datapipe.dataset.manifest import Manifest, libraries, load_unselected
from datapipe.dataset.packed_index import ensure_packed
from datapipe.dataset.quarantine import NAME as QUARANTINE
from datapipe.dataset.quarantine import Reasons, excluded, listed, write_quarantine
from datapipe.dataset.remarks import Remarks
from datapipe.ingest.ownership import claim_output, is_written
from datapipe.ingest.repartition import planned, repartition, rows_file
from datapipe.ingest.scan import Scanned, read_part, read_refused, scan_part
from datapipe.ingest.shard_plan import HOT, Candidates, Plan, plan_shards, repeated
from datapipe.ingest.shard_writer import Sheet, write_shard
from datapipe.ingest.spool import check_room, opened_spool
from datapipe.ingest.work_units import Listing
from datapipe.sources import open_sources
from datapipe.sources.base import Source
from datapipe.storage import Store, open_store, resolved_url, unsafe
from datapipe.storage.url_patterns import would_meet


@dataclass(frozen=True)
class Ingested:
    """How a run ended."""

    manifest: Manifest
    found_complete: bool
    """Nothing was left to do."""
    reasons: Reasons
    """Crops that were left out, by reason; empty where nothing was left to do."""
    remarks: Remarks
    """What of the sources was passed over or not understood; empty where nothing was left to do."""


def ingest(
    sources: Sequence[str],
    out: str,
    config: ShardConfig,
    storage: StorageConfig,
    *,
    licence: str = "",
    workers: Executor | None = None,
) -> Ingested:
    """Turn the crops of the sources into a data set in `out`, or finish what an earlier run began.

    `workers` does the work, by default processes of this machine; with workers on others, sources, `out` and the spool
    must be where all of them find them.

    Raises DataError where a source is missing, empty or damaged, where too many crops are unusable, and where `out`
    holds another data set.
    """
    refuse_inside(sources, out)
    opened = open_sources(sources, storage, jpeg_quality=config.jpeg_quality)
    return ingest_sources(opened, out, config, storage, licence=licence, workers=workers)


def ingest_sources(
    sources: Sequence[Source],
    out: str,
    config: ShardConfig,
    storage: StorageConfig,
    *,
    licence: str = "",
    workers: Executor | None = None,
) -> Ingested:
    """Ingest sources that are already open; otherwise as `ingest`."""
    store = open_store(out, storage)
    with (
        opened_spool(config.spool, out, storage) as (spool, local),
        Listing(sources, local) as listing,
        Workers(config.workers) as own,
    ):
        request = listing.request(config, licence)
        if is_written(store, request, out):
            whole = load_unselected(store.url, storage)
            ensure_packed(whole, storage)
            return Ingested(whole, True, {}, Remarks())
        run = _Ingestion(store, spool, local, config, storage, workers or own, listing.remarks)
        parts = run.scan(listing)
        for part in parts:
            run.remarks.add(part.remarks)
        run.judge(parts)
        crops, plan = run.plan(parts)
        claim_output(store, request)
        repartition(plan, crops, run.rows(parts), spool, local=local)
        reasons = run.quarantine(parts, planned(plan, crops, run.rows(parts)) if config.exclude != "none" else ())
        del crops
        shards = write_shards(plan, store, spool, storage, run.workers,
                              with_sidecars=config.sidecars == "json")  # fmt: skip
        manifest = Manifest(
            shards,
            name=listing.name,
            plan=plan.id,
            licence=licence,
            quarantined=sum(reasons.values()),
            made_by=libraries(),
        ).save(store)
        ensure_packed(manifest, storage)
        return Ingested(manifest, False, reasons, run.remarks)


def refuse_inside(sources: Sequence[str], out: str) -> None:
    """DataError where `out` lies inside a source: the next run would take the shards for a part of it."""
    for source in sources:
        place, whole = resolved_url(out), resolved_url(source)
        if f"{place}/".startswith(f"{whole}/") or any(
            would_meet(whole, f"{place}/shards/{name}") for name in ("0.tar", "00/0.tar")
        ):
            raise DataError("--out lies inside a source", where=out, hint="choose a folder beside the source")


@dataclass(frozen=True)
class _Ingestion:
    """The steps of one run, in their order."""

    store: Store
    spool: Store
    local: Path | None
    """The spool as a folder, if it is one."""
    config: ShardConfig
    storage: StorageConfig
    workers: Executor
    remarks: Remarks

    def scan(self, listing: Listing) -> list[Scanned]:
        """Every crop of the sources into the spool."""
        check_room(self.local, listing.bytes)
        parts: list[Scanned] = []
        crops = refused = 0
        with Progress("scan", listing.bytes) as progress:
            tasks = ((work, self.spool, self.config) for work in listing.work())
            for part in self.workers.run(scan_part, tasks, count=listing.parts):
                parts.append(part)
                scanned = part.kept + part.refused
                crops, refused = crops + scanned, refused + part.refused
                progress.advance(part.bytes, f"{counted(crops, 'crop')}, {refused:,} quarantined", crops=scanned)
        return parts

    def judge(self, parts: Sequence[Scanned]) -> None:
        """DataError where there are no crops, or more unusable ones than `max_bad`; quarantine.parquet lists them."""
        kept, refused = (sum(getattr(part, name) for part in parts) for name in ("kept", "refused"))
        if not kept + refused:
            raise DataError("the sources hold no images", where=self.store.url, hint="look into the tars")
        share = refused / (kept + refused)
        if share > self.config.max_bad or not kept:
            reasons = self.quarantine(parts)
            raise DataError(
                f"{refused:,} of {counted(kept + refused, 'crop')} ({share:.1%}) are unusable, more than --max-bad "
                f"{self.config.max_bad:.1%}: {listed(reasons)}",
                where=self.store.address(QUARANTINE),
                hint="see there which and why; mend the source, or raise --max-bad",
            )

    def quarantine(self, parts: Sequence[Scanned], rows: Iterable[pyarrow.Table] = ()) -> Reasons:
        """List what was refused, and what of the planned rows has no place."""
        refused = chain.from_iterable(read_refused(self.spool, part.part) for part in parts if part.refused)
        return write_quarantine(self.store, chain(refused, excluded(rows)), self.remarks, local=self.local)

    def plan(self, parts: Sequence[Scanned]) -> tuple[Candidates, Plan]:
        """What goes where. DataError where two crops have the same source and name."""
        crops = Candidates.room(sum(part.kept for part in parts))
        start = 0
        for part in parts:
            for rows in read_part(self.spool, part.part, ("key", "sha256", "dhash", *HOT.names)):
                crops.put(start, rows)
                start += rows.num_rows
        duplicate = repeated(crops)
        if duplicate is not None:
            raise DataError(
                "two crops of one source have the same name",
                where=self._named(parts, duplicate),
                hint="give each of them a name of its own, or leave one of the files out",
            )
        return crops, plan_shards(crops, self.config)

    def rows(self, parts: Sequence[Scanned]) -> Iterator[pyarrow.Table]:
        """All rows of the scan with the address of their object."""
        for part in parts:
            for rows in read_part(self.spool, part.part):
                segment = rows["segment"][0].as_py()
                if unsafe(segment):
                    raise DataError(
                        f"the spool names a file that cannot be its own: {unsafe(segment)}",
                        where=f"{self.spool.url}: {segment!r}",
                        hint="delete the spool's folder",
                    )
                url = self.spool.address(segment)
                yield rows.append_column("url", pyarrow.repeat(pyarrow.scalar(url), rows.num_rows))

    def _named(self, parts: Sequence[Scanned], row: int) -> str:
        """ "source: name" of a candidate."""
        for part in parts:
            if row < part.kept:
                rows = pyarrow.concat_tables(read_part(self.spool, part.part, ("source", "name")))
                return "{source}: {name}".format(**rows.slice(row, 1).to_pylist()[0])
            row -= part.kept
        raise AssertionError("no part holds the row")


def _has_any(store: Store, prefix: str) -> bool:
    """Is there an object whose name begins so?"""
    try:
        return next(store.list(prefix), None) is not None
    except NotFoundError:  # the folder itself is still to be made
        return False


def write_shards(
    plan: Plan, store: Store, spool: Store, storage: StorageConfig, workers: Executor, *, with_sidecars: bool
) -> tuple[Shard, ...]:
    """All shards of a plan, in their order; the rows of each are in the spool. What an earlier version of this project
    has begun goes on under its names."""
    name = plan.together if _has_any(store, plan.together(0).removesuffix("000000.tar")) else plan.name
    sheets = [
        Sheet(
            name(number),
            rows_file(plan, number),
            int(plan.cuts[number]),
            int(plan.cuts[number + 1]),
            with_sidecars,
        )
        for number in range(plan.shards)
    ]
    shards: list[Shard] = []
    with Progress("write", plan.bytes) as progress:
        tasks = ((store, spool, sheet, storage) for sheet in sheets)
        for shard in workers.run(write_shard, tasks, count=len(sheets)):
            shards.append(shard)
            progress.advance(shard.bytes, f"{len(shards)} of {counted(len(sheets), 'shard')}", crops=shard.rows)
    return tuple(shards)
