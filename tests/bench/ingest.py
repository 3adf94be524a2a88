"""Files -> checked shards with their index, against what cannot be saved: decoding them once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp

import simplejpeg

from datapipe.config import ShardConfig, StorageConfig
from datapipe.ingest import ingest as ingest_crops
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.measure import Work, rates
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target, compare

OURS, DECODE = "ingestion", "read and decode alone"


def ingest(scale: Scale) -> Table:
    """The whole of `python -m datapipe shard`, in one process."""
    rows = tuple(_row(crops(kind, scale), scale) for kind in KINDS)
    notes = (
        ABOUT,
        "ingestion: strict decode, sha256 and xxh3 of every crop, spool, tar, index, manifest; one process",
    )
    return Table("ingest", f"{scale.crops} files of each kind", "img/s per CPU-second", rows, notes)


def _row(found: Crops, scale: Scale) -> Row:
    with _ingestion(found) as ours:
        measured = rates({OURS: ours, DECODE: lambda: _decode(found.paths)}, scale.rounds)
    return compare(measured, f"{found.kind}: {OURS}", OURS, DECODE, Target(0.55))


@contextmanager
def _ingestion(found: Crops) -> Iterator[Work]:
    """Each time into a folder of its own."""
    outputs = Path(mkdtemp(prefix="ingest-", dir=found.folder.parent))
    runs = 0

    def work() -> int:
        nonlocal runs
        runs += 1
        with redirect_stderr(StringIO()):
            done = ingest_crops([str(found.files)], str(outputs / str(runs)), ShardConfig(workers=1), StorageConfig())
        return done.manifest.rows

    try:
        yield work
    finally:
        shutil.rmtree(outputs)


def _decode(paths: list[str]) -> int:
    for path in paths:
        with open(path, "rb") as file:
            simplejpeg.decode_jpeg(file.read(), colorspace="RGB", strict=True)
    return len(paths)
