"""Planned rows -> a USTAR tar of JPEGs and its parquet index, byte-identical whoever writes them, and how often.

A row says where its JPEG is now: `url`, `start` and `size`. That may be the spool or the tar of another data set.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from datapipe.core.bounds.parquet_pages import open_parquet
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, StorageError
from datapipe.dataset.index import INDEX, Shard
from datapipe.dataset.tar import BLOCK, headers, layout
from datapipe.ingest.repartition import rows_of_places
from datapipe.storage import Store, open_store, split_url

TAR_SHA256, TAR_BYTES = b"tar_sha256", b"tar_bytes"
"""Kept in the index, so that a finished shard need not be read again to be entered in a manifest."""
SIDECAR = ("key", "source", "name", "pid", "camera", "video", "track", "frame", "height", "width")
"""What <key>.json says of a crop."""
READ_BYTES = 16_000_000
"""Most bytes read at once."""
GAP_BYTES = 65_536
"""Bytes between two crops that are rather read along than skipped by a second request."""


class Sheet(NamedTuple):
    """What is to be written: a shard's name, and where its rows are."""

    name: str
    rows: str
    """Object of the spool with the planned rows of this shard and some others."""
    first: int
    end: int
    """The shard's places in the plan: [first, end)."""
    sidecars: bool


def write_shard(store: Store, spool: Store, sheet: Sheet, storage: StorageConfig) -> Shard:
    """Make one shard of the store: the tar, then its index, each once; one that is complete is left alone.

    Holds the tar in memory, and nothing else of that size. Raises DataError where the name holds other bytes or the
    crops are not what they were when they were planned.
    """
    index_name = sheet.name.removesuffix(".tar") + ".parquet"
    finished = _finished(store, sheet.name, index_name, sheet.end - sheet.first)
    if finished:
        return finished
    rows = rows_of_places(spool, sheet.rows, sheet.first, sheet.end)
    tar, offsets = build_tar(rows, storage, with_sidecars=sheet.sidecars)
    sha256 = hashlib.sha256(tar).hexdigest()
    _create(store, sheet.name, tar, sha256)
    index = build_index(rows, offsets, {TAR_SHA256: sha256.encode(), TAR_BYTES: str(len(tar)).encode()})
    index_sha256 = hashlib.sha256(index).hexdigest()
    _create(store, index_name, index, index_sha256)
    return Shard(sheet.name, rows.num_rows, len(tar), sha256, index_name, index_sha256)


def sidecars(rows: pyarrow.Table) -> list[bytes]:
    """The JSON beside each crop of rows with the columns SIDECAR."""
    return [json.dumps(row, sort_keys=True).encode() for row in rows.select(SIDECAR).to_pylist()]


def build_tar(
    rows: pyarrow.Table, storage: StorageConfig, *, with_sidecars: bool = False
) -> tuple[bytearray, np.ndarray]:
    """(the whole tar, offset int64[n] of each JPEG in it)."""
    keys, sizes, texts = rows["key"].to_pylist(), rows["size"].to_numpy(), sidecars(rows) if with_sidecars else []
    endings = ("jpg", "json") if with_sidecars else ("jpg",)
    if with_sidecars:
        sizes = np.stack([sizes, [len(text) for text in texts]], axis=1).ravel()
    offsets, total = layout(sizes)
    tar = bytearray(total)
    view = memoryview(tar)
    made = headers([f"{key}.{ending}" for key in keys for ending in endings], sizes).reshape(-1).data
    for number, offset in enumerate(offsets.tolist()):
        view[offset - BLOCK : offset] = made[number * BLOCK : (number + 1) * BLOCK]
    for number, text in enumerate(texts):
        offset = int(offsets[2 * number + 1])
        view[offset : offset + len(text)] = text
    offsets = offsets[:: len(endings)]
    _fill(view, offsets, rows, storage)
    return tar, offsets


def _fill(tar: memoryview, offsets: np.ndarray, rows: pyarrow.Table, storage: StorageConfig) -> None:
    """Fetch every crop and put it where it belongs."""
    targets, hashes = offsets.tolist(), rows["xxh3"].to_pylist()
    starts, sizes = (rows[name].to_numpy().astype(np.int64) for name in ("start", "size"))
    for url, members in _ranges(rows["url"], starts, sizes):
        begin = int(starts[members[0]])
        folder, name = split_url(url)
        try:
            data = memoryview(
                open_store(folder, storage).read(
                    name, start=begin, size=int(starts[members[-1]] + sizes[members[-1]]) - begin
                )
            )
        except NotFoundError as error:
            raise StorageError("crops that were read before are gone", where=url, hint=_AGAIN) from error
        places = (starts[members] - begin).tolist()
        for row, place, size in zip(members.tolist(), places, sizes[members].tolist(), strict=True):
            crop = data[place : place + size]
            if len(crop) != size or xxhash.xxh3_64_intdigest(crop) != hashes[row]:
                raise DataError("crops are not what they were when they were read before", where=url, hint=_AGAIN)
            tar[targets[row] : targets[row] + size] = crop


_AGAIN = "delete the spool folder and run the same command again"


def _ranges(urls: pyarrow.ChunkedArray, starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(object, rows in ascending order) of each stretch that is read at once."""
    encoded = urls.combine_chunks().dictionary_encode()
    if isinstance(encoded, pyarrow.ChunkedArray):
        encoded = encoded.combine_chunks()
    objects = encoded.indices.to_numpy()
    order = np.lexsort((starts, objects))
    ends = (starts + sizes)[order]
    new = (np.diff(objects[order]) != 0) | (starts[order][1:] - ends[:-1] > GAP_BYTES)
    begin = 0
    for end in [*(np.flatnonzero(new) + 1).tolist(), len(order)]:
        while begin < end:
            fitting = int(np.searchsorted(ends[begin:end], starts[order[begin]] + READ_BYTES, side="right"))
            stop = begin + max(1, fitting)
            yield encoded.dictionary[int(objects[order[begin]])].as_py(), order[begin:stop]
            begin = stop


def build_index(rows: pyarrow.Table, offsets: np.ndarray, facts: dict[bytes, bytes]) -> bytes:
    """The index as the bytes of a parquet file."""
    columns = {
        **{name: rows[name] for name in rows.column_names},
        "offset": offsets,
        "removed": np.zeros(rows.num_rows, bool),
    }
    table = pyarrow.table({name: columns[name] for name in INDEX.names}).cast(INDEX)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.combine_chunks().replace_schema_metadata(facts), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _finished(store: Store, name: str, index_name: str, rows: int) -> Shard | None:
    """The shard as an earlier run left it, if it was complete: the index is written last."""
    try:
        index = store.read(index_name)
    except NotFoundError:
        return None
    try:
        facts = open_parquet(index).metadata
        total = int(facts.metadata[TAR_BYTES])
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the index of a shard that an earlier run finished is damaged: {error}",
                        where=store.address(index_name),
                        hint="delete it and the shard, and run the same command again") from error  # fmt: skip
    if facts.num_rows != rows or not store.exists(name) or store.size(name) != total:
        raise DataError(
            "a shard and its index do not belong together",
            where=store.address(name),
            hint="delete both and run the same command again",
        )
    return Shard(name, rows, total, facts.metadata[TAR_SHA256].decode(), index_name, hashlib.sha256(index).hexdigest())


def _create(store: Store, name: str, data: bytes | bytearray, sha256: str) -> None:
    if not store.create(name, data) and hashlib.sha256(store.read(name)).hexdigest() != sha256:
        raise DataError(
            "the name is taken by other bytes",
            where=store.address(name),
            hint="delete the file and run the same command again, or choose another --out",
        )
