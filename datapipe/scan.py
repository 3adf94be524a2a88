"""Reads each crop of a source unit once, screens it, and puts what is kept into the spool.

Shards hold their crops in a global random order, sources are read from front to back: something has to bridge the
two. The spool, a local folder with one file of JPEG bytes and one table of rows per unit, does it for every kind of
source alike: a tar in gzip, a video or a bucket of small objects is read and decoded once and never sought in, what was
re-encoded is not encoded again, and a killed run keeps its finished units. The price is disk space of about the data
set's size until the shards are written. In memory there is never more than one crop per process.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash

from datapipe.config import ShardConfig
from datapipe.errors import StorageError
from datapipe.manifest import INDEX, libraries
from datapipe.plan_shards import rank, sample_key
from datapipe.screen import Kept, screen
from datapipe.sources import Crop, Source, Unit

VERSION = "scan 1"
"""Change it when screening changes: spooled units of before are then read again."""
ROWS = pyarrow.schema([
    *(column for column in INDEX if column.name != "offset"),
    ("rank", pyarrow.uint64()),  # place in the data set's order
    ("spool_offset", pyarrow.int64()),  # of the JPEG within its unit's spool file
    ("bytes", pyarrow.int64()),  # as found
    ("reason", pyarrow.string()),  # empty: kept
    ("detail", pyarrow.string()),
])


class Scanned(NamedTuple):
    """A unit whose crops are all in the spool."""

    unit: str
    """Name of its files there, without ending."""
    bytes: int
    """Bytes of the unit in its source."""
    rows: int
    refused: int


def scan_unit(source: Source, unit: Unit, spool: Path, config: ShardConfig) -> Scanned:
    """Read, screen and spool one unit; at once if an earlier run did. The table is written last."""
    name = _unit_name(source, unit, config)
    table_file = spool / f"{name}.parquet"
    try:
        if not table_file.exists():
            _scan(source, unit, spool / f"{name}.crops", table_file, config)
        reasons = pyarrow.parquet.read_table(table_file, columns=["reason"])["reason"]
    except OSError as error:
        raise StorageError(f"the spool cannot be written or read: {error.strerror or error}", where=str(spool),
                           hint="make room there, or give another folder with --spool") from error
    kept = pyarrow.compute.sum(pyarrow.compute.equal(reasons, "")).as_py() or 0
    return Scanned(name, unit.bytes, len(reasons), len(reasons) - kept)


def read_rows(spool: Path, unit: str) -> pyarrow.Table:
    """The rows (ROWS) of a scanned unit."""
    return pyarrow.parquet.read_table(spool / f"{unit}.parquet")


def _unit_name(source: Source, unit: Unit, config: ShardConfig) -> str:
    facts = (VERSION, source, unit.digest, config.min_size, config.max_aspect, config.max_pixels, config.jpeg_quality,
             config.seed, sorted(libraries().items()))
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _scan(source: Source, unit: Unit, crops_file: Path, table_file: Path, config: ShardConfig) -> None:
    ending = f".{secrets.token_hex(4)}.part"
    crops_part, table_part = (file.with_name(file.name + ending) for file in (crops_file, table_file))
    try:
        with open(crops_part, "xb") as spooled:
            columns: dict[str, list[Any]] = {name: [] for name in ROWS.names}
            for row in _rows(source.read(unit), spooled, config):
                for column, value in row.items():
                    columns[column].append(value)
        os.replace(crops_part, crops_file)
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=ROWS), table_part)
        os.replace(table_part, table_file)
    finally:
        crops_part.unlink(missing_ok=True)
        table_part.unlink(missing_ok=True)


def _rows(crops: Iterator[Crop], spooled: Any, config: ShardConfig) -> Iterator[dict[str, Any]]:
    for crop in crops:
        verdict = screen(crop.data, config)
        key = sample_key(crop.source, crop.name)
        row = {"key": key, "source": crop.source, "name": _text(crop.name), "pid": crop.pid, "camera": crop.camera,
               "video": crop.video, "track": crop.track, "frame": crop.frame, "dhash": 0, "duplicate_of": None,
               "near_of": None, "removed": False, "rank": rank(key, config.seed), "spool_offset": spooled.tell(),
               "bytes": len(crop.data)}
        if isinstance(verdict, Kept):
            spooled.write(verdict.data)
            yield {**row, "size": len(verdict.data), "height": verdict.height, "width": verdict.width,
                   "sha256": hashlib.sha256(verdict.data).digest(), "xxh3": xxhash.xxh3_64_intdigest(verdict.data),
                   "reason": "", "detail": ""}
        else:
            yield {**row, "size": 0, "height": 0, "width": 0, "sha256": bytes(32), "xxh3": 0,
                   "reason": str(verdict.reason), "detail": verdict.detail}


def _text(name: str) -> str:
    """A file name that is not UTF-8 can still be written in a table: its odd bytes as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
