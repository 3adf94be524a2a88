"""The index of a shard: one row per crop, in the order of the tar, in a parquet file of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.bounds.parquet_pages import open_parquet, read_table
from datapipe.core.errors import DataError
from datapipe.storage import Store

INDEX = pyarrow.schema(
    [
        ("key", pyarrow.string()),  # 32 hex digits: hash of (source, name); the member of the tar is "<key>.jpg"
        ("offset", pyarrow.int64()),  # of the JPEG's first byte within the tar
        ("size", pyarrow.int32()),  # bytes of the JPEG
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("sha256", pyarrow.binary(32)),  # of the JPEG
        ("xxh3", pyarrow.uint64()),  # of the JPEG; checked whenever the crop is read
        ("dhash", pyarrow.uint64()),  # difference hash of the upright image's luma, 64 bits
        ("source", pyarrow.string()),
        ("name", pyarrow.string()),  # original name within its source
        ("pid", pyarrow.int32()),  # as the source wrote it; -1: unknown, or junk in Market-1501
        ("camera", pyarrow.int16()),  # as the source wrote it, from 1; -1: unknown
        ("video", pyarrow.string()),  # name of the video within the source; empty where there is none
        ("track", pyarrow.int64()),  # unique within (source, video); -1: unknown
        ("frame", pyarrow.int64()),  # as the source numbers them; -1: unknown
        ("duplicate_of", pyarrow.string()),  # key of the first crop of the data set with the same bytes; null: none
        ("near_of", pyarrow.string()),  # key of the crop that this one is nearly equal to; null: none
        ("removed", pyarrow.bool_()),  # taken out: the row is a copy of another crop's, which takes its place
    ]
)
"""Columns of an index."""
MARKS = ("duplicate_of", "near_of")
"""Columns that name the crop of which a crop is a copy."""
RowMarks = tuple[str | None, str | None]
"""Values of MARKS."""
KEY = r"^[0-9a-f]{32}$"
REPAIR = "`python -m datapipe verify` lists what is wrong, and `--repair` mends what can be mended"


@dataclass(frozen=True)
class Shard:
    """One tar and its index; names are relative to the manifest's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


def read_index(store: Store, shard: Shard, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A shard's index, verified against the manifest. Raises DataError that names it."""
    where = store.address(shard.index)
    data = store.read_verified(shard.index, shard.index_sha256, what="an index of the data set", hint=REPAIR)
    try:
        file = open_parquet(data)
        schema = file.schema_arrow
        wanted = schema.names if columns is None else list(columns)
        lacking = [name for name in (wanted if columns is not None else INDEX.names) if name not in schema.names]
        if lacking:
            raise DataError(f"an index of the data set lacks the column {lacking[0]}", where=where, hint=REPAIR)
        if file.metadata.num_rows != shard.rows:
            raise DataError(
                f"an index has {file.metadata.num_rows:,} rows, the manifest says {shard.rows:,}",
                where=where,
                hint=REPAIR,
            )
        table = read_table(data, wanted)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"an index of the data set cannot be read: {error}", where=where, hint=REPAIR) from error
    _refuse_values(table, shard, where)
    refuse_keys(table, where)
    return table


def _refuse_values(table: pyarrow.Table, shard: Shard, where: str) -> None:
    """Raises DataError for columns of another type, for empty cells where there may be none, and for crops that do not
    lie within their tar: a checksum says that a file is the one that was written, not that it makes sense."""
    for name in set(table.column_names) & set(INDEX.names):
        kind = INDEX.field(name).type
        if table.schema.field(name).type != kind:
            raise DataError(f"the column {name} of an index is of type {table.schema.field(name).type}, not {kind}",
                            where=where, hint=REPAIR)  # fmt: skip
        if name not in MARKS and table[name].null_count:
            raise DataError(f"the column {name} of an index has empty cells", where=where, hint=REPAIR)
    if {"offset", "size"} <= set(table.column_names) and len(table):
        offset, size = (table[name].to_numpy().astype(np.int64) for name in ("offset", "size"))
        outside = (offset < 0) | (size <= 0) | (offset > shard.bytes - size)
        if outside.any():
            row = int(outside.argmax())
            raise DataError(
                f"an index has {int(outside.sum()):,} crops that do not lie within the {shard.bytes:,} bytes of their "
                f"tar, such as row {row} with {size[row]:,} bytes from {offset[row]:,} on", where=where, hint=REPAIR,
            )  # fmt: skip


def refuse_keys(table: pyarrow.Table, where: str) -> None:
    """Raises DataError where a key of a table, or one that it refers to, is no key: members of tars are called after
    them, and whoever unpacks those writes files of these names."""
    for name in ("key", *MARKS):
        if name in table.column_names:
            bad = pyarrow.compute.invert(pyarrow.compute.match_substring_regex(table[name], KEY))
            bad = table[name].filter(bad, null_selection_behavior="drop")
            if len(bad):
                raise DataError(
                    f"an index of the data set holds a key that is none: {bad[0].as_py()!r}",
                    where=f"{where}: column {name}",
                    hint="keys are 32 hex digits; copy the data set again",
                )


def whole_column(table: pyarrow.Table, name: str) -> pyarrow.Array:
    """A column as one array. Text becomes large text: plain text ends at 2 GiB, the keys of 67 million crops."""
    column = table[name]
    return (column.cast(pyarrow.large_string()) if column.type == pyarrow.string() else column).combine_chunks()


def content_words(table: pyarrow.Table) -> np.ndarray:
    """The first 16 bytes of each `sha256` as uint64[n, 2], enough to tell contents apart; no object per row."""
    column = whole_column(table, "sha256")
    end = column.offset + len(column)
    words = np.frombuffer(column.buffers()[1] or b"", np.uint64, count=4 * end)
    return words.reshape(-1, 4)[column.offset :, :2]
