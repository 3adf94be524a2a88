"""One run of `shard` on one machine: list, scan, plan, write, commit. Killed anywhere, the same command goes on.

    sources -> units -> scan (spool) -> plan -> shards (tar, then index) -> quarantine.parquet -> manifest

`request.json` is written before the first shard and says which crops and which settings the folder is for, so that
another data set is refused there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from datapipe.config import ShardConfig, StorageConfig
from datapipe.errors import DataError, NotFoundError, StorageError
from datapipe.manifest import NAME, Manifest, Shard, libraries
from datapipe.plan_shards import Plan, plan_shards
from datapipe.progress import Progress
from datapipe.scan import Scanned, read_rows, scan_unit
from datapipe.shard import write_shard
from datapipe.sources import Source, Unit, open_sources
from datapipe.storage import Store, is_remote, open_store, probe
from datapipe.workers import Executor, Workers

REQUEST, QUARANTINE, SPOOL = "request.json", "quarantine.parquet", ".spool"
DECIDING = ("samples_per_shard", "shard_mb", "min_size", "max_aspect", "max_pixels", "jpeg_quality", "seed")
"""Settings that change what is written."""
QUARANTINED = ("key", "source", "name", "reason", "detail", "bytes")
Work = list[tuple[Source, Unit]]


@dataclass(frozen=True)
class Ingested:
    """How a run ended."""

    manifest: Manifest
    found_complete: bool
    """Nothing was left to do."""
    reasons: dict[str, int]
    """Quarantined crops by reason; empty where nothing was left to do."""


def ingest(sources: Sequence[str], out: str, config: ShardConfig, storage: StorageConfig, *,
           licence: str = "", workers: Executor | None = None) -> Ingested:
    """Turn the crops of the sources into a data set in `out`, or finish what an earlier run began.

    `workers` does the work, by default processes of this machine; with workers on others, sources, `out` and the spool
    must be where all of them find them.

    Raises DataError where a source is missing, empty or damaged, where too many crops are unusable, and where `out`
    holds another data set.
    """
    _refuse_inside(sources, out)
    store = open_store(out, storage)
    found = _read_request(store)
    opened = open_sources(sources, storage)
    if found is None:
        probe(store).demand("ranges", "lists", where=out)
    work = [(source, unit) for source in opened for unit in source.units()]
    request = _request(work, config, licence)
    _refuse_other(store, found, request)
    spool = Path(config.spool or _default_spool(out))
    if found and store.exists(Manifest(()).file):
        shutil.rmtree(spool, ignore_errors=True)
        return Ingested(Manifest.load(store.address(Manifest(()).file), storage), True, {})
    with _locked(spool, out), Workers(config.workers) as own:
        workers = workers or own
        scan = _scan_all(work, spool, config, workers)
        kept, reasons = _separate(scan, store, config)
        plan = plan_shards(kept, config)
        if not store.create(REQUEST, request):
            _refuse_other(store, _read_request(store), request)
        shards = _write_all(plan, store, spool, workers)
        manifest = Manifest(shards, name="+".join(sorted(source.label for source in opened)), plan=plan.id,
                            licence=licence, quarantined=sum(reasons.values()), made_by=libraries()).save(store)
    shutil.rmtree(spool, ignore_errors=True)
    return Ingested(manifest, False, reasons)


def _scan_all(work: Work, spool: Path, config: ShardConfig, workers: Executor) -> pyarrow.Table:
    """Every crop of the sources as a row (scan.ROWS and `unit`)."""
    total = sum(unit.bytes for _, unit in work)
    _check_room(spool, total)
    tables, rows, refused = [], 0, 0
    with Progress("scan", total) as progress:
        tasks = ((source, unit, spool, config) for source, unit in work)
        for done in workers.run(scan_unit, tasks, count=len(work)):
            rows, refused = rows + done.rows, refused + done.refused
            tables.append(_rows_of(done, spool))
            progress.advance(done.bytes, f"{rows:,} crops, {refused:,} quarantined")
    return pyarrow.concat_tables(tables)


def _rows_of(done: Scanned, spool: Path) -> pyarrow.Table:
    unit = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * done.rows, pyarrow.int32()), [done.unit])
    return read_rows(spool, done.unit).append_column("unit", unit.cast(pyarrow.string()))


def _separate(scan: pyarrow.Table, store: Store, config: ShardConfig) -> tuple[pyarrow.Table, dict[str, int]]:
    """(the usable crops, quarantined crops by reason); writes quarantine.parquet, and fails above `max_bad`."""
    usable = pyarrow.compute.equal(scan["reason"], "")
    refused = scan.filter(pyarrow.compute.invert(usable)).select(QUARANTINED)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(refused.sort_by([("source", "ascending"), ("name", "ascending")]), sink)
    store.replace(QUARANTINE, sink.getvalue().to_pybytes())
    reasons = dict(sorted(Counter(refused["reason"].to_pylist()).items()))
    kept = scan.filter(usable)
    if not scan.num_rows:
        raise DataError("the sources hold no images", where=store.url, hint="look into the tars")
    share = refused.num_rows / scan.num_rows
    if share > config.max_bad or not kept.num_rows:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        raise DataError(f"{refused.num_rows:,} of {scan.num_rows:,} crops ({share:.1%}) are unusable, more than "
                        f"--max-bad {config.max_bad:.1%}: {counts}", where=store.address(QUARANTINE),
                        hint="see there which and why; mend the source, or raise --max-bad")
    return kept, reasons


def _write_all(plan: Plan, store: Store, spool: Path, workers: Executor) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    with Progress("write", plan.shards) as progress:
        tasks = ((store, plan.name(number), _packed(plan.rows(number)), spool) for number in range(plan.shards))
        for shard in workers.run(write_shard, tasks, count=plan.shards):
            shards.append(shard)
            progress.advance(1, f"{len(shards)} of {plan.shards} shards")
    return tuple(shards)


def _packed(rows: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return sink.getvalue().to_pybytes()


# ------------------------------------------------------------------------------------------- whose folder is it


def _request(work: Work, config: ShardConfig, licence: str) -> bytes:
    """What the folder is made from, the same on every machine and in whatever order the sources were given."""
    digests: dict[str, Any] = {}
    for source, unit in work:
        digests.setdefault(source.label, hashlib.sha256()).update(unit.digest.encode())
    record = {"format": 1, "licence": licence, "settings": {name: getattr(config, name) for name in DECIDING},
              "sources": {label: digest.hexdigest() for label, digest in digests.items()}}
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _refuse_inside(sources: Sequence[str], out: str) -> None:
    """The next run would take the shards for a part of the source."""
    for source in sources:
        if f"{_absolute(out)}/".startswith(f"{_absolute(source)}/"):
            raise DataError("--out lies inside a source", where=out, hint="choose a folder beside the source")


def _absolute(url: str) -> str:
    return url.rstrip("/") if is_remote(url) else os.path.realpath(os.path.expanduser(url.removeprefix("file://")))


def _read_request(store: Store) -> bytes | None:
    try:
        return store.read(REQUEST)
    except NotFoundError:
        pass
    with contextlib.suppress(NotFoundError):
        for entry in store.list("manifest-v"):
            if NAME.fullmatch(entry.name):
                raise DataError("another data set is already there", where=store.address(entry.name),
                                hint="choose another --out")
    return None


def _refuse_other(store: Store, found: bytes | None, request: bytes) -> None:
    if found is None or found == request:
        return
    there, here = json.loads(found), json.loads(request)
    differences = [f"{name} is {there['settings'].get(name)} there and {value} here"
                   for name, value in here["settings"].items() if there["settings"].get(name) != value]
    if there["sources"] != here["sources"]:
        changed = sorted(set(there["sources"].items()) ^ set(here["sources"].items()))
        differences.append("other sources, or other files in them: " + ", ".join(sorted({name for name, _ in changed})))
    if there["licence"] != here["licence"]:
        differences.append("another licence")
    raise DataError("--out belongs to another data set: " + "; ".join(differences), where=store.address(REQUEST),
                    hint="choose another --out, or delete that folder")


# -------------------------------------------------------------------------------------------------------- the spool


def _default_spool(out: str) -> Path:
    if not is_remote(out):
        return Path(os.path.expanduser(out.removeprefix("file://"))) / SPOOL
    name = hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"datapipe-spool-{os.getuid()}-{name}"


@contextlib.contextmanager
def _locked(spool: Path, out: str) -> Iterator[None]:
    """Keep a second run on this machine away from the spool; the lock ends with the process, however it ends."""
    try:
        spool.mkdir(parents=True, exist_ok=True)
        handle = open(spool / "lock", "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise StorageError(f"the spool cannot be made: {error.strerror}", where=str(spool),
                           hint="check the permissions there, or give another folder with --spool") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError("another run is writing this data set right now", where=out,
                            hint="wait for it, or choose another --out") from error
        yield


def _check_room(spool: Path, wanted: int) -> None:
    free = shutil.disk_usage(spool).free + sum(file.stat().st_size for file in spool.glob("*.crops"))
    if free < wanted:
        raise StorageError(f"the spool needs about {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                           where=str(spool), hint="make room there, or give another folder with --spool")
