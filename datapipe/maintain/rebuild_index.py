"""A lost index, from its tar."""

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import simplejpeg
import xxhash

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError
from datapipe.dataset.duplicates import Marks, exact_duplicates, near_duplicates
from datapipe.dataset.index import INDEX, KEY, MARKS, Shard, content_words, read_index
from datapipe.dataset.perceptual_hash import difference_hash
from datapipe.ingest.shard_plan import Within, hot_columns
from datapipe.ingest.shard_writer import TAR_BYTES, TAR_SHA256, build_index
from datapipe.maintain.rewrite_shards import with_index
from datapipe.storage import Store

UNKNOWN = {"source": "", "name": "", "pid": -1, "camera": -1, "video": "", "track": -1, "frame": -1}
WITHIN: tuple[Within, ...] = ("source", "track", "none")
RELATED = ("key", "sha256", "dhash", "source", "name", "height", "width", "pid", "camera", "video", "track", "frame")


def members(tar: bytes) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """The JPEGs of a tar by key: (offset, size, what its sidecar says; {} without one).

    Raises DataError for one whose name is no key: it would be written into the new index, and others unpack by it.
    """
    try:
        return _members(tar)
    except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
        raise DataError(f"a tar of the data set cannot be read: {error}",
                        hint="copy the data set again") from error  # fmt: skip


def _members(tar: bytes) -> dict[str, tuple[int, int, dict[str, Any]]]:
    crops: dict[str, tuple[int, int, dict[str, Any]]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            key, _, ending = member.name.rpartition(".")
            if ending == "jpg":
                if not re.fullmatch(KEY, key):
                    raise DataError("a crop in a tar of the data set is not called after its key", where=member.name,
                                    hint="keys are 32 hex digits; the tar was not written by this project")  # fmt: skip
                crops[key] = member.offset_data, member.size, {}
            elif ending == "json" and key in crops:
                text = tar[member.offset_data : member.offset_data + member.size]
                crops[key] = *crops[key][:2], parse_record(text)
    return crops


def rebuild(store: Store, shard: Shard, ordinal: int, others: Mapping[int, Shard]) -> tuple[Shard, bool]:
    """(the shard with a new index, whether names and labels are known). Its tar is intact and holds a crop per row.

    `others`: the shards of the data set whose indexes are good, by their number; duplicates are marked among all of
    them. Where the rebuilt index is the lost one, byte for byte, it takes its name, and the shard is what it was.
    """
    tar = store.read(shard.name)
    try:
        rows = _rows(tar)
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"the crops of a tar are no rows of an index: {error}", where=store.address(shard.name),
                        hint="copy the data set again") from error  # fmt: skip
    labelled = all(sidecar for _, _, sidecar in members(tar).values())
    tables = {number: read_index(store, other) for number, other in others.items()}
    facts = {TAR_SHA256: shard.sha256.encode(), TAR_BYTES: str(shard.bytes).encode()}
    for within in WITHIN if labelled else ():
        marked = _marked(rows, ordinal, tables, within)
        index = build_index(marked, marked["offset"].to_numpy(), facts)
        if hashlib.sha256(index).hexdigest() == shard.index_sha256:
            store.replace(shard.index, index)
            return shard, True
    marked = _marked(rows, ordinal, tables, "source" if labelled else "none")
    return with_index(store, shard, marked, np.arange(len(marked)), np.zeros(len(marked), bool)), labelled


def _rows(tar: bytes) -> pyarrow.Table:
    """The crops of a tar as rows of an index without marks."""
    rows = []
    for key, (offset, size, sidecar) in members(tar).items():
        data = tar[offset : offset + size]
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        rows.append(
            {
                "key": key,
                "offset": offset,
                "size": size,
                "height": height,
                "width": width,
                "removed": False,
                "sha256": hashlib.sha256(data).digest(),
                "xxh3": xxhash.xxh3_64_intdigest(data),
                "dhash": difference_hash(data),
                **UNKNOWN,
                **{name: sidecar[name] for name in UNKNOWN if name in sidecar},
            }
        )
    return pyarrow.Table.from_pylist(rows, INDEX)


def _marked(rows: pyarrow.Table, ordinal: int, others: Mapping[int, pyarrow.Table], within: Within) -> pyarrow.Table:
    """The rows with their duplicates marked among all crops of the data set, in its order."""
    tables = {ordinal: rows, **others}
    parts = {
        number: tables[number].filter(pyarrow.compute.invert(tables[number]["removed"])).select(RELATED)
        for number in sorted(tables)
    }
    start = sum(part.num_rows for number, part in parts.items() if number < ordinal)
    table = pyarrow.concat_tables(parts.values())
    group = hot_columns(table, np.zeros(len(table), np.int64), seed=0, near_within=within)["group"].to_numpy()
    marks_of_kind = exact_duplicates(content_words(table)), near_duplicates(table["dhash"].to_numpy(), group)
    for name, marks in zip(MARKS, marks_of_kind, strict=True):
        column = pyarrow.array(_originals(marks, table, start, start + len(rows)), pyarrow.string())
        rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows


def _originals(marks: Marks, table: pyarrow.Table, start: int, end: int) -> list[str | None]:
    """For each place in [start, end) the key of its original."""
    low, high = np.searchsorted(marks.places, (start, end))
    keys: list[str | None] = [None] * (end - start)
    for place, original in zip(marks.places[low:high], marks.originals[low:high], strict=True):
        keys[int(place) - start] = table["key"][int(original)].as_py()
    return keys
