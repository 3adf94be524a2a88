"""Files -> checked shards with their index, against what cannot be saved: decoding them once."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp

import simplejpeg

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.ingest.pipeline import ingest as ingest_crops
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.measure import Work, rates
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target, compare

OURS, READ, DECODE = "ingestion", "read and decode alone", "decode alone, bytes in memory"
FOLDERS = 4
"""So many folders with the same files are read, as sources of their own: what a run does once shall not count much."""


def ingest(scale: Scale) -> Table:
    """The whole of `python -m datapipe shard`, in one process."""
    rows = tuple(row for kind in KINDS for row in _rows(crops(kind, scale), scale))
    notes = (
        ABOUT,
        "ingestion: strict decode, sha256, xxh3 and difference hash of every crop, spool, plan with exact and near "
        "duplicates, tar, index, manifest; one process",
        "decoding: to RGB, by simplejpeg, strict; ingestion passes over the same coefficients and makes luma of them",
    )
    return Table("ingest", f"{FOLDERS * scale.crops} files of each kind", "img/s per CPU-second", rows, notes)


def _rows(found: Crops, scale: Scale) -> Iterator[Row]:
    paths, jpegs = FOLDERS * found.paths, FOLDERS * found.jpegs
    with _ingestion(found) as ours:
        works = {OURS: ours, READ: lambda: _decode(map(_read, paths)), DECODE: lambda: _decode(jpegs)}
        measured = rates(works, scale.rounds)
    yield compare(measured, f"{found.kind}: {OURS}", OURS, READ, Target(0.55))
    yield compare(measured, f"{found.kind}: {OURS}", OURS, DECODE)


@contextmanager
def _ingestion(found: Crops) -> Iterator[Work]:
    """Each time into a folder of its own."""
    place = Path(mkdtemp(prefix="ingest-", dir=found.folder.parent))
    sources = [str(place / f"files-{number}") for number in range(FOLDERS)]
    for source in sources:
        shutil.copytree(found.files, source, copy_function=os.link)
    runs = 0

    def work() -> int:
        nonlocal runs
        runs += 1
        with redirect_stderr(StringIO()):
            done = ingest_crops(sources, str(place / f"out-{runs}"), ShardConfig(workers=1), StorageConfig())
        shutil.rmtree(done.manifest.url)
        return done.manifest.rows

    try:
        yield work
    finally:
        shutil.rmtree(place)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _decode(jpegs: Iterable[bytes]) -> int:
    count = 0
    for data in jpegs:
        simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        count += 1
    return count
