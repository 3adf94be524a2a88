"""Shards without some of their crops, and without a change to any row number.

The row of a crop that was taken out stays: it becomes a copy of the next row of its shard that is still there, so that
the order of a training run under way does not move and readers need no special case. New tars and indexes are named
after their content; written twice, they are the same.
"""

import dataclasses
import hashlib
import tarfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash

from datapipe.core.bounds.text_trees import parse_json
from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.index import INDEX, MARKS, RowMarks, Shard, read_index
from datapipe.dataset.tar import BLOCK, END_BYTES, header, member_bytes
from datapipe.storage import Store


class Change(NamedTuple):
    """What becomes of one shard."""

    out: np.ndarray
    """Rows (int64, within the shard) whose crops go."""
    marks: Mapping[int, RowMarks]
    """New marks of rows whose original goes."""
    mend: bool = False
    """The tar is damaged: its sound crops are copied one by one, and all around them is written anew."""


def rewrite(store: Store, shard: Shard, change: Change) -> Shard:
    """Write the shard without the crops that go; at least one has to stay. Holds the tar twice in memory.

    Raises DataError where the tar is not what was written, unless it is to be mended.
    """
    table = _marked(read_index(store, shard), change.marks)
    present = ~table["removed"].to_numpy()
    staying = present.copy()
    staying[change.out] = False
    if len(change.out) or change.mend:
        tar = _read(store, shard, intact=not change.mend)
        made, offsets = copied(tar, table, present=present, staying=staying, mend=change.mend)
        name, sha256 = _create(store, made, ".tar")
        shard = dataclasses.replace(shard, name=name, bytes=len(made), sha256=sha256)
        table = table.set_column(table.column_names.index("offset"), "offset", pyarrow.array(offsets))
    live = np.flatnonzero(staying)
    return with_index(store, shard, table, live[np.searchsorted(live, np.arange(shard.rows)) % len(live)], ~staying)


def stand_in(store: Store, shard: Shard, host: Shard) -> Shard:
    """A shard of which no crop is left: its rows become copies of those of another, in turns."""
    table = read_index(store, host)
    live = np.flatnonzero(~table["removed"].to_numpy())
    rows = live[np.arange(shard.rows) % len(live)]
    entry = dataclasses.replace(host, rows=shard.rows)
    return with_index(store, entry, table, rows, np.ones(shard.rows, bool))


def with_index(store: Store, shard: Shard, table: pyarrow.Table, rows: np.ndarray, removed: np.ndarray) -> Shard:
    """Write an index that consists of these rows of the table, with these marks of removal."""
    place = table.column_names.index("removed")
    index = table.take(rows).set_column(place, "removed", pyarrow.array(removed)).select(INDEX.names).cast(INDEX)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(index.combine_chunks().replace_schema_metadata(None), sink, compression="zstd")
    name, sha256 = _create(store, sink.getvalue().to_pybytes(), ".parquet")
    return dataclasses.replace(shard, index=name, index_sha256=sha256)


def copied(
    tar: bytes, table: pyarrow.Table, *, present: np.ndarray, staying: np.ndarray, mend: bool
) -> tuple[bytearray, np.ndarray]:
    """(a new tar of the crops that stay, with what lies behind each of them; offset int64 of each row that stays).

    `there`: the rows whose crops the tar holds.
    """
    starts, sizes = table["offset"].to_numpy(), table["size"].to_numpy()
    keys, hashes = table["key"].to_pylist(), table["xxh3"].to_pylist()
    rows = np.flatnonzero(present)
    ends = dict(zip(rows.tolist(), [*(starts[rows[1:]] - BLOCK).tolist(), len(tar) - END_BYTES], strict=True))
    made, offsets = bytearray(), starts.copy()
    for row in np.flatnonzero(staying).tolist():
        start, size = int(starts[row]), int(sizes[row])
        data = tar[start : start + size]
        if len(data) != size or xxhash.xxh3_64_intdigest(data) != hashes[row]:
            raise DataError(f"the crop {keys[row]} is damaged", hint="`python -m datapipe verify --repair` removes it")
        offsets[row] = len(made) + BLOCK
        made += header(keys[row], size) + data + bytes(-size % BLOCK)
        behind = tar[start - BLOCK + int(member_bytes(np.array([size]))[0]) : ends[row]]
        made += behind if not mend or _is_sidecar(behind, keys[row]) else b""
    return made + bytes(END_BYTES), offsets


def _is_sidecar(data: bytes, key: str) -> bool:
    """Whether these blocks are the whole description of a crop."""
    try:
        member = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "strict")
        parse_json(data[BLOCK : BLOCK + member.size])
    except (tarfile.HeaderError, ValueError):
        return False
    return member.name == f"{key}.json" and len(data) == BLOCK + member.size + -member.size % BLOCK


def _marked(table: pyarrow.Table, marks: Mapping[int, RowMarks]) -> pyarrow.Table:
    for number, name in enumerate(MARKS if marks else ()):
        values = table[name].to_pylist()
        for row, new in marks.items():
            values[row] = new[number]
        table = table.set_column(table.column_names.index(name), name, pyarrow.array(values, pyarrow.string()))
    return table


def _read(store: Store, shard: Shard, *, intact: bool) -> bytes:
    what = "a tar of the data set"
    if intact:
        hint = "copy it there again; where there is no copy, `python -m datapipe verify --repair` first"
        return store.read_verified(shard.name, shard.sha256, what=what, hint=hint)
    try:
        return store.read(shard.name)
    except NotFoundError as error:
        raise DataError(f"{what} is missing", where=store.address(shard.name), hint="copy it there again") from error


def _create(store: Store, data: bytes | bytearray, ending: str) -> tuple[str, str]:
    """Write an object under the name of its content: (name, sha256)."""
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"shards/{sha256[:32]}{ending}"
    store.create_by_content(name, data)
    return name, sha256
