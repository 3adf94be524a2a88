"""Plan rows -> a USTAR tar of JPEGs and its parquet index, byte-identical whoever writes them, and how often."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from datapipe.errors import DataError, NotFoundError, StorageError
from datapipe.manifest import INDEX, Shard
from datapipe.plan_shards import BLOCK, END_BYTES, member_bytes
from datapipe.storage import Store

TAR_SHA256, TAR_BYTES = b"tar_sha256", b"tar_bytes"
"""Kept in the index, so that a finished shard need not be read again to be entered in a manifest."""


def header(key: str, size: int) -> bytes:
    """The tar header of a crop: 512 bytes that depend on nothing else."""
    member = tarfile.TarInfo(f"{key}.jpg")
    member.size, member.mode = size, 0o644  # time, owner and group are 0 by default
    return member.tobuf(tarfile.USTAR_FORMAT)


def write_shard(store: Store, name: str, rows: bytes, spool: Path) -> Shard:
    """Make one shard of the store: the tar, then its index, each once; one that is complete is left alone.

    `rows`: the plan's rows (scan.ROWS and `unit`) as an Arrow IPC stream, in the order of the tar. Holds the tar in
    memory, and nothing else. Raises DataError where the name holds other bytes.
    """
    table = pyarrow.ipc.open_stream(rows).read_all()
    index_name = name.removesuffix(".tar") + ".parquet"
    finished = _finished(store, name, index_name, table.num_rows)
    if finished:
        return finished
    offsets, total = layout(table["size"].to_numpy())
    tar = build_tar(table, offsets, total, spool)
    sha256 = hashlib.sha256(tar).hexdigest()
    _create(store, name, tar, sha256)
    index = build_index(table, offsets, {TAR_SHA256: sha256.encode(), TAR_BYTES: str(total).encode()})
    index_sha256 = hashlib.sha256(index).hexdigest()
    _create(store, index_name, index, index_sha256)
    return Shard(name, table.num_rows, total, sha256, index_name, index_sha256)


def layout(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(offset int64[n] of each JPEG in the tar, bytes of the tar)."""
    taken = member_bytes(sizes)
    ends = np.cumsum(taken)
    return ends - taken + BLOCK, int(ends[-1]) + END_BYTES


def build_tar(rows: pyarrow.Table, offsets: np.ndarray, total: int, spool: Path) -> bytearray:
    """The whole tar, filled from the spool unit by unit. DataError if the spool is not what the scan wrote."""
    tar = bytearray(total)
    view = memoryview(tar)
    keys, units, hashes = (rows[column].to_pylist() for column in ("key", "unit", "xxh3"))
    starts, sizes = rows["spool_offset"].to_numpy(), rows["size"].to_numpy()
    unit, file = "", None
    try:
        for row in sorted(range(len(keys)), key=lambda row: (units[row], starts[row])):
            if file is None or units[row] != unit:
                if file:
                    file.close()
                unit = units[row]
                file = open(spool / f"{unit}.crops", "rb")  # noqa: SIM115  (closed when the next unit begins)
            start, size = int(offsets[row]), int(sizes[row])
            file.seek(int(starts[row]))
            data = view[start:start + size]
            if file.readinto(data) != size or xxhash.xxh3_64_intdigest(data) != hashes[row]:
                raise DataError("the spool was damaged since the crops were read", where=file.name,
                                hint="delete the spool folder and run the same command again")
            view[start - BLOCK:start] = header(keys[row], size)
    except OSError as error:
        raise StorageError(f"the spool cannot be read: {error.strerror or error}", where=str(spool),
                           hint="run the same command again") from error
    finally:
        if file:
            file.close()
    return tar


def build_index(rows: pyarrow.Table, offsets: np.ndarray, facts: dict[bytes, bytes]) -> bytes:
    """The index as the bytes of a parquet file."""
    table = rows.append_column("offset", pyarrow.array(offsets)).select(INDEX.names).cast(INDEX)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.combine_chunks().replace_schema_metadata(facts), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _finished(store: Store, name: str, index_name: str, rows: int) -> Shard | None:
    """The shard as an earlier run left it, if it was complete: the index is written last."""
    try:
        index = store.read(index_name)
    except NotFoundError:
        return None
    facts = pyarrow.parquet.read_metadata(pyarrow.BufferReader(index))
    total = int(facts.metadata[TAR_BYTES])
    if facts.num_rows != rows or not store.exists(name) or store.size(name) != total:
        raise DataError("a shard and its index do not belong together", where=store.address(name),
                        hint="delete both and run the same command again")
    return Shard(name, rows, total, facts.metadata[TAR_SHA256].decode(), index_name, hashlib.sha256(index).hexdigest())


def _create(store: Store, name: str, data: bytes | bytearray, sha256: str) -> None:
    if not store.create(name, data) and hashlib.sha256(store.read(name)).hexdigest() != sha256:
        raise DataError("the name is taken by other bytes", where=store.address(name),
                        hint="delete the file and run the same command again, or choose another --out")
