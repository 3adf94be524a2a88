"""The packed index: what streaming needs of all indexes of a version, in one file that is mapped into memory.

    packed-v1-<manifest id, 16 hex>-<sha256 of the file>.index

It is derived: it may be deleted, and is written anew when the version is made again or next opened. Its bytes follow
from the version alone, and its name says what they are, so that a damaged file is told from a whole one. 16 to 26 bytes
a row, in columns of little-endian numbers, each from a multiple of ALIGNMENT on:

    starts  int64  [shards + 1]  the first row of each shard of the manifest, and the number of rows
    offset  uint32 or int64      of the JPEG in its tar, in units of 512 bytes or of one
    size    int32                bytes of the JPEG
    xxh3    uint64               of the JPEG
    pid     int32                left out where all are -1, as is
    camera  int16
    footer: JSON; its length, 8 bytes; MAGIC
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, UserError
from datapipe.core.progress import QUIET_S, Progress
from datapipe.dataset.index import read_index
from datapipe.dataset.manifest import INDEX_READS, Manifest
from datapipe.dataset.tar import BLOCK
from datapipe.storage import Data, Entry, Store, open_store

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"(?:.*/)?packed-v\d+-(?P<version>[0-9a-f]{16})-(?P<sha256>[0-9a-f]{64})\.index")
"""A packed index of any format, wherever it lies."""
MAGIC = b"crops-i1"
ALIGNMENT = 4096
MOST_FOOTER = 64 << 20
LEAST_PART, PARTS = 32 << 20, 16
"""A packed index is fetched in so many parts at most, of so many bytes at least (but for the last one)."""
PARTS_IN_FLIGHT, MOST_IN_FLIGHT = 4, 512 << 20
"""Parts that are fetched at a time, at most, and their bytes, but for a part that has more by itself."""
LABELS = ("pid", "camera")
UNKNOWN = -1
ROW_COLUMNS = ("offset", "size", "xxh3", *LABELS)
KINDS: Mapping[str, tuple[str, ...]] = {
    "starts": ("<i8",), "offset": ("<u4", "<i8"), "size": ("<i4",), "xxh3": ("<u8",), "pid": ("<i4",),
    "camera": ("<i2",),
}  # fmt: skip
"""The types that a column may have."""
HINT = "delete the file: it is made anew of the indexes"


@dataclass(frozen=True)
class PackedIndex:
    """The columns of a packed index, in memory that may be shared with other processes. Only to be read."""

    starts: NDArray[Any]
    offset: NDArray[Any]
    unit: int
    """Bytes that `offset` counts in."""
    size: NDArray[Any]
    xxh3: NDArray[Any]
    pid: NDArray[Any]
    camera: NDArray[Any]
    jpeg_bytes: int
    """Sum of all sizes."""
    replaced: frozenset[str]
    """sha256 of tars that only versions have which this one took the place of: crops were removed from them."""


class _Column(NamedTuple):
    kind: np.dtype[Any]
    first: int
    """Its first byte within the file."""
    length: int


class _ShardFacts(NamedTuple):
    """What the footer needs of each shard."""

    jpeg_bytes: int
    labelled: tuple[bool, ...]
    """For each of LABELS, whether a row has one."""


class _UnalignedError(Exception):
    """A JPEG begins at no multiple of 512 bytes, or too far behind in its tar."""


def prefix(version: str) -> str:
    """How names of packed indexes of a version begin that can be read; `version`: id of its manifest."""
    return f"packed-v{FORMAT}-{version[:16]}-"


def packed_entries(store: Store, manifest: Manifest) -> list[Entry]:
    """The packed indexes of a version in the folder of the data set: one, as a rule, or none."""
    try:
        return [entry for entry in store.list(prefix(manifest.id)) if NAME.fullmatch(entry.name)]
    except NotFoundError:
        return []


def of_version(name: str, version: str) -> bool:
    """Whether a file is a packed index of the version with this id, by its name."""
    found = NAME.fullmatch(name)
    return found is not None and found["version"] == version[:16]


def name_of(version: str, sha256: str) -> str:
    """The name of a version's packed index with this content, within the data set; `version`: id of its manifest."""
    return f"{prefix(version)}{sha256}.index"


def stated_sha256(name: str) -> str:
    """The sha256 (hex) that a packed index has by its name."""
    found = NAME.fullmatch(name)
    assert found is not None
    return found["sha256"]


def sha256_of(file: IO[bytes]) -> str:
    """The sha256 (hex) of a whole open file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- writing


def pack(manifest: Manifest, file: IO[bytes], storage: StorageConfig) -> str:
    """Read the indexes of a version and write its packed index into an empty file; returns the sha256 (hex).

    Holds a few shards' rows in memory. Raises DataError that names an index which is missing or damaged, OSError where
    the file cannot be written.
    """
    try:
        _pack(manifest, file, storage, unit=BLOCK)
    except _UnalignedError:
        os.ftruncate(file.fileno(), 0)
        _pack(manifest, file, storage, unit=1)
    return sha256_of(file)


def _pack(manifest: Manifest, file: IO[bytes], storage: StorageConfig, *, unit: int) -> None:
    store, number = open_store(manifest.url, storage), file.fileno()
    chosen = manifest.rows_of_shards(storage)
    counts = np.zeros(len(manifest.shards) + 1, np.int64)
    for ordinal, rows in chosen.items():
        counts[ordinal + 1] = manifest.shards[ordinal].rows if rows is None else len(rows)
    starts = np.cumsum(counts)
    columns, end = _layout(len(starts), int(starts[-1]), unit)
    _write(number, starts.astype(columns["starts"].kind), columns["starts"].first)

    def pack_shard(ordinal: int) -> _ShardFacts:
        rows, shard = chosen[ordinal], manifest.shards[ordinal]
        table = read_index(store, shard, ROW_COLUMNS)
        if rows is not None and len(rows) < shard.rows:
            table = table.take(rows)
        values = {name: table[name].to_numpy() for name in ROW_COLUMNS}
        if unit != 1:
            values["offset"] = _in_units(values["offset"], unit)
        for name, column in values.items():
            place = columns[name]
            _write(number, column.astype(place.kind), place.first + int(starts[ordinal]) * place.kind.itemsize)
        labelled = tuple(bool((values[name] != UNKNOWN).any()) for name in LABELS)
        return _ShardFacts(int(values["size"].sum(dtype=np.int64)), labelled)

    with (
        Progress("pack the index", len(chosen), unit="shards", quiet_s=QUIET_S) as progress,
        ThreadPoolExecutor(INDEX_READS) as pool,
    ):
        facts = list(progress.over(pool.map(pack_shard, chosen), lambda _: 1))
    for place in reversed(range(len(LABELS))):  # what nobody has is left out, from the end on
        if any(shard.labelled[place] for shard in facts):
            break
        end = columns.pop(LABELS[place]).first
    footer = {
        "format": FORMAT,
        "manifest": manifest.id,
        "unit": unit,
        "jpeg_bytes": sum(shard.jpeg_bytes for shard in facts),
        "columns": {name: [column.kind.str, column.first, column.length] for name, column in columns.items()},
        "replaced": sorted(_replaced(manifest, store)),
    }
    text = json.dumps(footer, sort_keys=True, separators=(",", ":")).encode()
    os.ftruncate(number, end)
    _write(number, text + len(text).to_bytes(8, "little") + MAGIC, end)


def _layout(starts: int, rows: int, unit: int) -> tuple[dict[str, _Column], int]:
    """(the columns, where the last one ends)."""
    columns, end = {}, 0
    for name, kinds in KINDS.items():
        kind = np.dtype(kinds[-1] if unit == 1 else kinds[0])
        first = -(-end // ALIGNMENT) * ALIGNMENT
        columns[name] = _Column(kind, first, starts if name == "starts" else rows)
        end = first + columns[name].length * kind.itemsize
    return columns, end


def _in_units(offset: NDArray[Any], unit: int) -> NDArray[Any]:
    units, rest = np.divmod(offset, unit)
    if rest.any() or (len(units) and units.max() >= 1 << 32):
        raise _UnalignedError
    return units


def _write(number: int, data: NDArray[Any] | bytes, place: int) -> None:
    view = memoryview(data if isinstance(data, bytes) else data.tobytes())
    while len(view):
        done = os.pwrite(number, view, place)
        view, place = view[done:], place + done


def _replaced(manifest: Manifest, store: Store) -> set[str]:
    """sha256 of tars that only versions have which this one took the place of."""
    if not manifest.replaces:
        return set()
    kept = {shard.sha256 for shard in manifest.shards}
    before = (version for version in Manifest.versions(store) if version.id in manifest.replaces)
    return {shard.sha256 for version in before for shard in version.shards} - kept


# ------------------------------------------------------------------------------------------------------------- reading


def unpack(data: Any, manifest: Manifest, where: str) -> PackedIndex:
    """The columns within the bytes of a packed index whose sha256 was compared: a buffer, which they keep alive.

    Raises DataError where it is no packed index, or another version's.
    """
    try:
        footer, end = _footer(data)
        if footer["format"] != FORMAT or footer["manifest"] != manifest.id:
            raise ValueError("it is that of another version")
        columns = {
            name: _column(data, end, name, footer["columns"][name], manifest)
            for name in KINDS
            if name in footer["columns"]
        }
        unknown = {name: np.broadcast_to(np.array(UNKNOWN, KINDS[name][0]), manifest.rows) for name in LABELS}
        columns = {**unknown, **columns}
        starts, unit = columns["starts"], footer["unit"]
        if starts[0] != 0 or starts[-1] != manifest.rows or (np.diff(starts) < 0).any() or unit not in (1, BLOCK):
            raise ValueError("its rows are not those of the shards")
        return PackedIndex(**columns, unit=unit, jpeg_bytes=int(footer["jpeg_bytes"]),
                           replaced=frozenset(footer["replaced"]))  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the packed index cannot be used: {error}", where=where, hint=HINT) from error


def _footer(data: Any) -> tuple[dict[str, Any], int]:
    """(the footer, where the columns end)."""
    view = memoryview(data)
    tail = len(MAGIC) + 8
    if len(view) < tail or bytes(view[-len(MAGIC) :]) != MAGIC:
        raise ValueError("it is cut off, or no such file")
    length = int.from_bytes(view[-tail : -len(MAGIC)], "little")
    end = len(view) - tail - length
    if length > MOST_FOOTER or end < 0:
        raise ValueError("its footer is damaged")
    return parse_record(bytes(view[end : end + length])), end


def _column(data: Any, end: int, name: str, stated: Any, manifest: Manifest) -> NDArray[Any]:
    kind, first, count = stated
    wanted = len(manifest.shards) + 1 if name == "starts" else manifest.rows
    if kind not in KINDS[name] or count != wanted or first < 0 or first + count * np.dtype(kind).itemsize > end:
        raise ValueError(f"its column {name} is not that of {manifest.rows:,} rows")
    dtype: DTypeLike = kind
    return np.frombuffer(data, dtype, count, first) if count else np.empty(0, dtype)


# ---------------------------------------------------------------------------------------------------- of the data set


def publish(store: Store, manifest: Manifest, sha256: str, data: Data, wrong: Collection[str] = ()) -> None:
    """Write a packed index into the folder of its data set, unless crops were removed from the version meanwhile. The
    `wrong` ones of this version that are there go.

    Raises StorageError where that cannot be done.
    """
    name = name_of(manifest.id, sha256)
    for other in wrong:
        if other != name:
            store.delete(other)
    if name in wrong:
        store.replace(name, data)
    else:
        store.create(name, data)
    if manifest.successor(store) is not None:  # who makes one deletes what is there by then
        store.delete(name)


def ensure_packed(manifest: Manifest, storage: StorageConfig, *, mend: bool = False) -> None:
    """Write the packed index of a version into its data set, if there is none. `mend`: also where one is there that is
    not what the indexes say; those go.

    Without it the version is whole: what goes wrong is a warning, and who opens the version next tries again.
    """
    store = open_store(manifest.url, storage)
    try:
        present = packed_entries(store, manifest)
        if present and not mend:
            return
        with tempfile.NamedTemporaryFile(prefix="reid_packed_") as file:
            sha256 = pack(manifest, file, storage)
            wrong = _wrong(store, present, name_of(manifest.id, sha256))
            if wrong or not present:
                publish(store, manifest, sha256, Path(file.name), wrong)
    except (UserError, OSError) as error:
        log.warning("%s has no packed index yet, it is made when it is next opened: %s", manifest.file, error)


def wrong_entries(manifest: Manifest, storage: StorageConfig) -> list[str]:
    """Names of the version's packed indexes that are not what its indexes say. Raises DataError where these are
    damaged."""
    store = open_store(manifest.url, storage)
    present = packed_entries(store, manifest)
    if not present:
        return []
    with tempfile.TemporaryFile(prefix="reid_packed_") as file:
        name = name_of(manifest.id, pack(manifest, file, storage))
    return _wrong(store, present, name)


def fetch(store: Store, entry: Entry, file: IO[bytes]) -> None:
    """Copy a packed index into an empty file, unchecked: some requests at a time, each held in memory."""
    parts, at_a_time = parts_of(entry.size)
    number = file.fileno()

    def copy(start: int) -> int:
        data = store.read(entry.name, start=start, size=min(parts.step, entry.size - start))
        _write(number, data, start)
        return len(data)

    with (
        Progress("fetch the packed index", entry.size, quiet_s=QUIET_S) as progress,
        ThreadPoolExecutor(at_a_time) as pool,
    ):
        for size in pool.map(copy, parts):
            progress.advance(size)


def parts_of(size: int) -> tuple[range, int]:
    """(where the parts begin that a packed index of so many bytes is fetched in, so many at a time)."""
    step = max(LEAST_PART, -(-size // PARTS))
    return range(0, size, step), max(1, min(PARTS_IN_FLIGHT, MOST_IN_FLIGHT // step))


def _wrong(store: Store, present: list[Entry], name: str) -> list[str]:
    """Packed indexes of a version that are called otherwise than `name`, or do not hold what that says."""
    wrong = []
    for entry in present:
        with tempfile.TemporaryFile(prefix="reid_packed_") as file:
            if entry.name == name:
                fetch(store, entry, file)
            if entry.name != name or sha256_of(file) != stated_sha256(name):
                wrong.append(entry.name)
    return wrong
