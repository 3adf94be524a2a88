"""Reads each crop of the sources once, screens it, and puts what is kept into the spool.

Shards hold their crops in a global random order, sources are read from front to back: something has to bridge the
two. The spool, a folder on this machine, a shared one or an object store, does it for every kind of source alike: a
tar in gzip, a video or a bucket of small objects is read and decoded once and never sought in, what was re-encoded is
not encoded again, and a killed run keeps its finished parts. The price is room of about the data set's size until the
shards are written.

A part of the work leaves in the spool:

    <part>-000.crops        JPEGs one after the other, in the order of the shards: what one shard takes is one range
    <part>-001.crops        ... the next SEGMENT_BYTES; so much is held in memory, twice at most
    <part>.refused.parquet  the crops that are quarantined, where there are any
    <part>.parquet          a row for each kept crop; written last, so that its presence means the part is complete
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from datapipe.core.bounds.parquet_pages import open_parquet
from datapipe.core.config import ShardConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import libraries
from datapipe.dataset.perceptual_hash import DifferenceHashes
from datapipe.dataset.quarantine import REFUSED
from datapipe.dataset.remarks import METADATA as REMARKS
from datapipe.dataset.remarks import Remarks
from datapipe.dataset.tar import member_bytes
from datapipe.ingest.screen import RULES, Kept, Reason, Refused, screen
from datapipe.ingest.shard_plan import HOT, hot_columns, sample_key
from datapipe.ingest.shard_writer import sidecars
from datapipe.sources.base import Crop, Source, Unit
from datapipe.sources.location import printable
from datapipe.storage import Store

VERSION = f"scan 3, rules {RULES}"
"""Of what is spooled: parts of another version are read again."""
TEST_FOLDER = re.compile(
    r"(?:^|[/\\])(query|gallery|bounding_box_test|gt_bbox|gt_query|mask_test_v2|test|test_probe|test_gallery|probe)[/\\]"
)
"""Folders of labelled sets that hold what is scored."""
SEGMENT_BYTES = 64_000_000
"""JPEG bytes at which a segment is closed."""
MOST_CROPS = 100_000
"""Crops at which it is closed as well: their rows are held in memory, too."""
LABELS = ("source", "name", "pid", "camera", "video", "track", "frame")
FOUND = ("key", "size", "height", "width", "sha256", "xxh3", *LABELS)
"""What the scan knows of each kept crop by itself."""
ROWS = pyarrow.schema(
    [
        *(INDEX.field(name) for name in FOUND),
        INDEX.field("dhash"),
        *HOT,
        ("segment", pyarrow.string()),  # the object that holds the JPEG
        ("start", pyarrow.int64()),  # of the JPEG within it
    ]
)
Work = Sequence[tuple[Source, Unit]]
"""Units that are scanned together."""


class Scanned(NamedTuple):
    """A part whose crops are all in the spool."""

    part: str
    """Name of its objects there, without ending."""
    kept: int
    refused: int
    bytes: int
    """Bytes of its units in their sources."""
    spooled: int
    """Bytes of the JPEGs that were kept."""
    remarks: Remarks
    """What was passed over and not understood while the units were read."""


def scan_part(work: Work, spool: Store, config: ShardConfig) -> Scanned:
    """Read, screen and spool some units; at once if an earlier run did."""
    part = _part_name(work, config)
    total = sum(unit.bytes for _, unit in work)
    try:
        footer = _spooled(spool, f"{part}.parquet").metadata
        kept, refused, spooled = footer.num_rows, int(footer.metadata[b"refused"]), int(footer.metadata[b"spooled"])
        remarks = Remarks.from_json(footer.metadata[REMARKS])
    except NotFoundError:
        remarks = Remarks()
        kept, refused, spooled = _scan(work, part, spool, config, remarks)
    return Scanned(part, kept, refused, total, spooled, remarks)


def _spooled(spool: Store, name: str) -> pyarrow.parquet.ParquetFile:
    try:
        return open_parquet(spool.read(name))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"what an earlier run has left of its work is damaged: {error}", where=spool.address(name),
                        hint="delete that folder, and run the same command again") from error  # fmt: skip


def read_part(spool: Store, part: str, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
    """The rows of a scanned part, ROWS or some of its columns, segment by segment."""
    file = _spooled(spool, f"{part}.parquet")
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, columns=None if columns is None else list(columns), use_threads=False)


def read_refused(spool: Store, part: str) -> Iterator[pyarrow.Table]:
    """The quarantined crops of a scanned part that has any, REFUSED, some at a time."""
    file = _spooled(spool, f"{part}.refused.parquet")
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, use_threads=False)


def inspected(work: Work, config: ShardConfig, remarks: Remarks) -> Iterator[tuple[Crop, Kept | Refused]]:
    """Every crop of the units with what screening says of it. What is passed over, not understood or of a test set is
    counted in `remarks`."""
    for source, unit in work:
        for crop in source.read(unit, remarks):
            remarks.unread_labels.update(crop.unread)
            if folder := TEST_FOLDER.search(crop.name):
                remarks.test_images[printable(folder[1])] += 1
            yield crop, _unreadable(crop.problem) if crop.problem else screen(crop.data, config)


def _unreadable(problem: str) -> Refused:
    return Refused(Reason.CORRUPT if "damaged" in problem else Reason.NOT_AN_IMAGE, problem)


def _part_name(work: Work, config: ShardConfig) -> str:
    facts = (
        VERSION,
        [(source, unit.digest) for source, unit in work],
        config.min_size,
        config.max_aspect,
        config.max_pixels,
        config.jpeg_quality,
        config.seed,
        config.near_within,
        config.sidecars,
        sorted(libraries().items()),
    )
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _scan(work: Work, part: str, spool: Store, config: ShardConfig, remarks: Remarks) -> tuple[int, int, int]:
    """(crops kept, crops refused, bytes spooled)."""
    refused = _RefusedRows()
    rows = _Rows(part, spool, config)
    segment = _Segment()
    for crop, verdict in inspected(work, config, remarks):
        if isinstance(verdict, Kept):
            segment.add(crop, verdict)
            if segment.bytes >= SEGMENT_BYTES or len(segment.found) >= MOST_CROPS:
                rows.add(segment)
                segment = _Segment()
        else:
            refused.add(
                (
                    sample_key(crop.source, crop.name),
                    crop.source,
                    _text(crop.name),
                    str(verdict.reason),
                    verdict.detail,
                    len(crop.data),
                )
            )
    if segment.found:
        rows.add(segment)
    if refused.count:
        spool.replace(f"{part}.refused.parquet", refused.close())
    rows.close(refused=refused.count, remarks=remarks)
    return rows.count, refused.count, rows.bytes


class _RefusedRows:
    """The table of what a part loses, packed as it grows: an archive may hold millions of empty files."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[tuple[Any, ...]] = []
        self._sink = pyarrow.BufferOutputStream()
        self._writer = pyarrow.parquet.ParquetWriter(self._sink, REFUSED, compression="lz4")

    def add(self, row: tuple[Any, ...]) -> None:
        self._waiting.append(row)
        self.count += 1
        if len(self._waiting) >= MOST_CROPS:
            self._flush()

    def close(self) -> bytes:
        """The whole file."""
        if self._waiting:
            self._flush()
        self._writer.close()
        content: bytes = self._sink.getvalue().to_pybytes()
        return content

    def _flush(self) -> None:
        self._writer.write_table(_table(REFUSED, self._waiting))
        self._waiting = []


class _Rows:
    """The table of a part, a row group per segment."""

    def __init__(self, part: str, spool: Store, config: ShardConfig) -> None:
        self.part, self.spool, self.config = part, spool, config
        self.segments = self.count = self.bytes = 0
        self._sink = pyarrow.BufferOutputStream()
        self._writer = pyarrow.parquet.ParquetWriter(
            self._sink, ROWS, compression="lz4", use_dictionary=["source", "video", "segment"]
        )

    def add(self, segment: "_Segment") -> None:
        rows = segment.write(f"{self.part}-{self.segments:03d}.crops", self.spool, self.config)
        self._writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        self.segments += 1
        self.count += rows.num_rows
        self.bytes += segment.bytes

    def close(self, *, refused: int, remarks: Remarks) -> None:
        """Write it: the part is complete."""
        facts = {"refused": str(refused), "spooled": str(self.bytes), REMARKS.decode(): remarks.to_json()}
        self._writer.add_key_value_metadata(facts)
        self._writer.close()
        self.spool.replace(f"{self.part}.parquet", self._sink.getvalue().to_pybytes())


class _Segment:
    """Kept crops on their way into one object of the spool."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []
        self.hashes = DifferenceHashes()
        self.data: list[bytes] = []
        self.bytes = 0

    def add(self, crop: Crop, kept: Kept) -> None:
        data = kept.data
        self.found.append(
            (
                sample_key(crop.source, crop.name),
                len(data),
                kept.height,
                kept.width,
                hashlib.sha256(data).digest(),
                xxhash.xxh3_64_intdigest(data),
                crop.source,
                _text(crop.name),
                crop.pid,
                crop.camera,
                crop.video,
                crop.track,
                crop.frame,
            )
        )
        self.hashes.add(kept.luma)
        self.data.append(data)
        self.bytes += len(data)

    def write(self, name: str, spool: Store, config: ShardConfig) -> pyarrow.Table:
        """The rows (ROWS) in the order of the shards, their JPEGs being in the spool."""
        rows = _table(pyarrow.schema([INDEX.field(name) for name in FOUND]), self.found)
        sizes = rows["size"].to_numpy()
        taken = member_bytes(sizes)
        if config.sidecars == "json":
            taken += member_bytes(np.array([len(text) for text in sidecars(rows)]))
        hot = hot_columns(rows, taken, seed=config.seed, near_within=config.near_within)
        order = np.argsort(hot["rank"].to_numpy(), kind="stable")
        spool.replace(name, b"".join([self.data[row] for row in order]))
        sizes = sizes[order].astype(np.int64)
        columns = {
            **dict(zip(rows.column_names, rows.take(order).columns, strict=True)),
            "dhash": self.hashes.all()[order],
            **dict(zip(HOT.names, hot.take(order).columns, strict=True)),
            "segment": pyarrow.repeat(pyarrow.scalar(name), len(order)),
            "start": np.cumsum(sizes) - sizes,
        }
        return pyarrow.table(columns, schema=ROWS)


def _table(schema: pyarrow.Schema, rows: list[tuple[Any, ...]]) -> pyarrow.Table:
    columns = zip(*rows, strict=True)
    return pyarrow.table(
        [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema
    )


def _text(name: str) -> str:
    """A file name that is not UTF-8 can still be written in a table: its odd bytes as \\xNN."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
