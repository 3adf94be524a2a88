"""Rows of the index -> bytes of the shards: neighbours in one request, whole blocks kept in a bounded cache."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
from xxhash import xxh3_64_hexdigest as xxh3_hex
from xxhash import xxh3_64_intdigest as xxh3

from datapipe.core.errors import DataError, NotFoundError, UserError
from datapipe.core.randomness import Ints, UInts
from datapipe.dataset.index import Shard
from datapipe.storage import Store
from datapipe.storage.local import OpenFilesStore
from datapipe.storage.pace import UNLIMITED, Pace
from datapipe.stream.disk_cache import ByteRange
from datapipe.stream.reading_plan import among, numbers_of

GAP_BYTES = 16 << 10
"""Unwanted bytes between two crops that are cheaper to read along than to ask for separately."""

Rows = dict[int, bytes]


class MissingShardError(DataError):
    """A shard of the data set is not there."""


@dataclass(frozen=True)
class Places:
    """Where each row's bytes are. Rows of a shard are neighbours, in the order of the shards. The columns may lie in a
    file that is mapped: nothing of their length is made of them."""

    shards: tuple[Shard, ...]
    starts: Ints
    """[shards + 1] The first row of each shard, and the number of rows."""
    units: Ints | UInts
    """[rows] Offset of each row's bytes in its tar, in units of `unit` bytes."""
    size: Ints
    """[rows] Bytes."""
    xxh3: UInts
    """[rows] Of the bytes."""
    unit: int = 1

    def shard(self, rows: Ints) -> Ints:
        """The number of the shard that holds each of these rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def offset(self, rows: Ints | slice) -> Ints:
        """Where the bytes of these rows begin in their tars."""
        return self.units[rows].astype(np.int64) * self.unit

    def name(self, row: int) -> str:
        """The shard that holds the row."""
        return self.shards[int(self.shard(np.array([row]))[0])].name

    def matches(self, row: int, data: bytes) -> bool:
        """Whether these are the bytes of the row."""
        return xxh3(data) == int(self.xxh3[row])


class Cache(Protocol):
    """Keeps blocks under keys that follow from their content: see `DiskCache` and `MemoryCache`."""

    def held(self, key: str, parts: list[ByteRange]) -> list[bytes] | None:
        """These parts of a block, if it is there."""

    def has(self, key: str) -> bool:
        """Whether it is there."""

    def load(self, key: str, parts: list[ByteRange], fetch: Callable[[], bytes]) -> list[bytes]:
        """These parts of a block that was not there."""

    def keep(self, key: str) -> None:
        """A block that may be there will be wanted."""

    def retire(self, key: str) -> None:
        """A block is not wanted for long."""

    def forget(self, key: str) -> None:
        """Drop a block."""


class Blocks:
    """Rows cut into blocks, each of one shard: `size` consecutive rows, fewer where a shard ends.

    As bytes, a block is its crops one after the other, without headers and gaps. Holds two numbers per block, none per
    row.
    """

    def __init__(self, places: Places, size: int) -> None:
        self._places = places
        rows = len(places.size)
        self.first: Ints = np.union1d(np.arange(0, rows, size), places.starts[places.starts < rows])
        self.end: Ints = np.append(self.first[1:], rows)

    def of(self, rows: Ints) -> Ints:
        """The number of the block that holds each row."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def start(self, rows: Ints) -> Ints:
        """Where the crops of these sorted rows begin within their blocks, in bytes."""
        numbers, which = np.unique(self.of(rows), return_inverse=True)
        first, end = self.first[numbers], self.end[numbers]
        lengths = end - first
        ahead = np.cumsum(lengths) - lengths  # rows of all these blocks before each
        within = np.repeat(first - ahead, lengths) + np.arange(lengths.sum())
        ends = np.cumsum(self._places.size[within], dtype=np.int64)
        begins = np.append(0, ends)
        return begins[(ahead - first)[which] + rows] - begins[ahead[which]]

    def rows(self, number: int) -> Ints:
        """All rows of a block."""
        return np.arange(self.first[number], self.end[number])

    def key(self, number: int) -> str:
        """What the block is: the content of its shard and the ranges within."""
        mine = slice(int(self.first[number]), int(self.end[number]))
        ranges = np.stack([self._places.offset(mine), self._places.size[mine]]).astype("<i8")
        shard = self._places.shards[int(self._places.shard(self.first[[number]])[0])]
        return f"{shard.sha256}-{xxh3_hex(ranges.tobytes())}"


class BlockReader:
    """Unchecked bytes of rows. A row whose shard ends early comes back short or empty, or filled up with zeros.

    Without a cache only what is asked for is read; otherwise whole blocks are, the share `kept` of them. `in_flight`
    requests at a time; 0 reads in the calling thread (local disks). `ahead`: the share of blocks that are brought in
    before they are wanted, by as many requests again; None where `prepare` is not called. No request is sent before
    `pace` lets it. Safe for many threads.
    """

    def __init__(
        self, store: Store, places: Places, *, block: int, cache: Cache | None, in_flight: int, kept: float = 1.0,
        ahead: float | None = None, pace: Pace = UNLIMITED,
    ) -> None:  # fmt: skip
        self.store, self.places, self.cache, self._block = store, places, cache, block
        self._kept, self._ahead, self._pace = kept, ahead or 0.0, pace
        self.bytes_read = 0
        """Asked of the store."""
        self.hits, self.reads = 0, 0
        """Crops that came from the cache, of so many."""
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(in_flight, "datapipe-read") if in_flight else None
        self._keys: dict[int, str] = {}
        self.ahead = ThreadPoolExecutor(in_flight, "datapipe-ahead") if in_flight and ahead is not None else None
        """Brings blocks in; None where nobody tells what comes."""
        self._turns: dict[int, set[int]] = {}
        """The blocks of each turn that was prepared and is not over."""

    @cached_property
    def blocks(self) -> Blocks:
        """How rows are cut; only readers with a cache need to know."""
        return Blocks(self.places, self._block)

    def read(self, rows: Ints) -> Rows:
        """The bytes of these rows, by row."""
        rows = np.unique(rows)
        if self.cache is None:
            return self._fetch(rows, self._in_parallel)
        kept = self.keeps(rows)
        data_of_row: Rows = {}
        singly, asked = rows[~kept], len(rows)
        rows = rows[kept]
        missing: dict[int, dict[int, ByteRange]] = {}
        for number, wanted in self._by_block(rows).items():
            parts = self.cache.held(self._key(number), list(wanted.values()))
            if parts is None:
                missing[number] = wanted
            else:
                data_of_row.update(zip(wanted, parts, strict=True))
        with self._lock:
            self.reads += asked
            self.hits += len(data_of_row)
        data_of_row.update(self._fetch(singly, self._in_parallel))
        for part in self._in_parallel(self._load, missing, missing.values()):
            data_of_row.update(part)
        return data_of_row

    def keeps(self, rows: Ints) -> np.ndarray:
        """Whether the blocks of these rows are read as a whole and kept, bool [n]."""
        if self._kept >= 1:
            return np.ones(len(rows), dtype=np.bool_)
        return among(numbers_of(self.blocks.of(rows)), self._kept)

    def read_anew(self, row: int) -> bytes:
        """One row from the store itself; the cache forgets the block that holds it, as it may be broken there."""
        if self.cache is not None:
            self.cache.forget(self._key(int(self.blocks.of(np.array([row]))[0])))
        return self._fetch(np.array([row]), map)[row]

    def read_checked(self, row: int, name: str) -> bytes:
        """The bytes of one row as the index promises them, asked for twice where they arrive broken. Raises DataError
        with the `name` of the crop where they stay so."""
        data = self.read(np.array([row]))[row]
        if not self.places.matches(row, data):
            data = self.read_anew(row)
        if not self.places.matches(row, data):
            raise DataError(
                f"the crop {name} is damaged",
                where=self.store.address(self.places.name(row)),
                hint="`python -m datapipe verify` lists what is wrong; here every crop is wanted",
            )
        return data

    def prepare(self, rows: Ints, turns: Ints) -> None:
        """These rows will be wanted, in turns that rise along the stream (see `SampleOrder.turns`): in the background,
        bring in their blocks, as far as that is done ahead; each once in a turn."""
        if self.ahead is None:
            return
        assert self.cache is not None
        kept = self.keeps(rows)
        blocks, turns = self.blocks.of(rows[kept]), turns[kept]
        with self._lock:
            new = set[int]()
            for turn in np.unique(turns).tolist():
                known = self._turns.setdefault(turn, set())
                some = set(blocks[turns == turn].tolist()) - known
                known |= some
                new |= some
        numbers = np.array(sorted(new), dtype=np.int64)
        in_part = among(numbers_of(numbers), self._ahead)
        for number in numbers[in_part].tolist():
            self.ahead.submit(self._bring, number)
        for number in numbers[~in_part].tolist():
            self.cache.keep(self._key(number))

    def passed(self, turns: Ints) -> None:
        """What is read from now on is of these turns or later ones: blocks of earlier ones need not be kept."""
        if self.ahead is None or not len(turns):
            return
        assert self.cache is not None
        with self._lock:
            over = [turn for turn in self._turns if turn < turns.min()]
            done = set[int]().union(*(self._turns.pop(turn) for turn in over)).difference(*self._turns.values())
        for number in sorted(done):
            self.cache.retire(self._key(number))

    def close(self) -> None:
        """End the reading threads and close the files."""
        self._pace.end()
        for pool in (self.ahead, self._pool):
            if pool:
                pool.shutdown(cancel_futures=True)
        if isinstance(self.store, OpenFilesStore):
            self.store.close()

    @property
    def _in_parallel(self) -> Callable[..., Iterator[Any]]:
        return self._pool.map if self._pool else map

    def _by_block(self, rows: Ints) -> dict[int, dict[int, ByteRange]]:
        """Block -> row -> where it is within the block."""
        grouped: dict[int, dict[int, ByteRange]] = {}
        columns = (self.blocks.of(rows), rows, self.blocks.start(rows), self.places.size[rows])
        for number, row, start, size in zip(*(column.tolist() for column in columns), strict=True):
            grouped.setdefault(number, {})[row] = (start, size)
        return grouped

    def _key(self, number: int) -> str:
        if number not in self._keys:
            self._keys[number] = self.blocks.key(number)
        return self._keys[number]

    def _load(self, number: int, wanted: dict[int, ByteRange]) -> Rows:
        assert self.cache is not None
        parts = self.cache.load(self._key(number), list(wanted.values()), lambda: self._fetch_block(number))
        return dict(zip(wanted, parts, strict=True))

    def _bring(self, number: int) -> None:
        assert self.cache is not None
        with suppress(UserError):  # whoever needs the block will meet the error
            if self.cache.has(self._key(number)):
                self.cache.keep(self._key(number))
            else:
                self.cache.load(self._key(number), [], lambda: self._fetch_block(number))

    def _fetch_block(self, number: int) -> bytes:
        """A block from the store; crops that arrive broken are asked for once more, and kept broken after that."""
        rows = self.blocks.rows(number)
        sizes, promised = self.places.size[rows].tolist(), self.places.xxh3[rows].tolist()
        data_of_row = self._fetch(rows, map)
        broken = [row for row, hash_ in zip(data_of_row, promised, strict=True) if xxh3(data_of_row[row]) != hash_]
        data_of_row |= self._fetch(np.array(broken, dtype=np.int64), map)
        return b"".join(data.ljust(size, b"\0") for data, size in zip(data_of_row.values(), sizes, strict=True))

    def _fetch(self, rows: Ints, run: Callable[..., Iterator[Any]]) -> Rows:
        """Sorted rows from the store itself."""
        if not len(rows):
            return {}
        spans = self._spans(rows)
        loaded = list(run(self._read, spans.shard.tolist(), spans.start.tolist(), spans.size.tolist()))
        with self._lock:
            self.bytes_read += sum(map(len, loaded))
        within = (self.places.offset(rows) - spans.start[spans.of]).tolist()
        sizes = self.places.size[rows].tolist()
        return {
            row: loaded[span][first : first + size]
            for row, span, first, size in zip(rows.tolist(), spans.of.tolist(), within, sizes, strict=True)
        }

    def _spans(self, rows: Ints) -> "_Spans":
        """Sorted rows, cut where the shard changes or the gap is too wide for one request."""
        shard, start, size = self.places.shard(rows), self.places.offset(rows), self.places.size[rows]
        gap = start[1:] - (start[:-1] + size[:-1])
        apart = (np.diff(shard) != 0) | (gap < 0) | (gap > GAP_BYTES)
        of = np.concatenate([[0], np.cumsum(apart)])
        first = np.concatenate([[True], apart])
        last = np.concatenate([apart, [True]])
        return _Spans(shard[first], start[first], (start + size)[last] - start[first], of)

    def _read(self, shard: int, start: int, size: int) -> bytes:
        name = self.places.shards[shard].name
        self._pace.wait()
        try:
            return self.store.read(name, start=start, size=size)
        except NotFoundError as error:
            raise MissingShardError(
                f"the shard {name} of the data set is missing",
                where=self.store.address(name),
                hint="copy it there again, or make the data set again from its crops with `python -m datapipe shard`",
            ) from error


class _Spans(NamedTuple):
    """Ranges to be read, and for each row the number of the one that holds it."""

    shard: Ints
    start: Ints
    size: Ints
    of: Ints
