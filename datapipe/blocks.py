"""Rows of the index -> bytes of the shards: neighbours in one request, whole blocks kept in a bounded memory."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from datapipe.errors import DataError, NotFoundError
from datapipe.randomness import Ints
from datapipe.storage import Store
from datapipe.storage.kept import KeptStore

GAP_BYTES = 16 << 10
"""Unwanted bytes between two crops that are cheaper to read along than to ask for separately."""

Rows = dict[int, bytes]


class Places(NamedTuple):
    """Where each row's bytes are: the names of all shards; and for every row, number of the shard, offset, size."""

    shards: list[str]
    shard: Ints
    offset: Ints
    size: Ints

    def name(self, row: int) -> str:
        """The shard that holds the row."""
        return self.shards[int(self.shard[row])]


class Reader:
    """Unchecked bytes of rows. A row whose shard ends early comes back short or empty. Safe for many threads.

    With `keep_bytes` = 0 only what is asked for is read; otherwise whole blocks of `block` rows are, and the most
    recently used ones are kept. `in_flight` requests at a time; 0 reads in the calling thread (local disks).
    """

    def __init__(self, store: Store, places: Places, *, block: int, keep_bytes: int, in_flight: int) -> None:
        self.store, self.places, self.block = store, places, block
        self.bytes_read = 0
        self._lock = Lock()
        self._cache = _Cache(keep_bytes) if keep_bytes else None
        self._pool = ThreadPoolExecutor(in_flight, "datapipe-read") if in_flight else None

    def read(self, rows: Ints) -> Rows:
        """The bytes of these rows, by row."""
        rows = np.unique(rows)
        if self._cache is None:
            return self.read_now(rows)
        numbers = np.unique(rows // self.block).tolist()
        blocks = self._pool.map(self._block, numbers) if self._pool else map(self._block, numbers)
        held = dict(zip(numbers, blocks, strict=True))
        return {row: held[row // self.block][row] for row in rows.tolist()}

    def read_now(self, rows: Ints) -> Rows:
        """The same for sorted rows, from the store itself."""
        if not len(rows):
            return {}
        spans = self._spans(rows)
        many = self._pool is not None and self._cache is None  # else this already runs in the pool
        load = self._pool.map if many and self._pool else map
        loaded = list(load(self._load, spans.shard.tolist(), spans.start.tolist(), spans.size.tolist()))
        with self._lock:
            self.bytes_read += sum(map(len, loaded))
        within = (self.places.offset[rows] - spans.start[spans.of]).tolist()
        sizes = self.places.size[rows].tolist()
        return {
            row: loaded[span][first : first + size]
            for row, span, first, size in zip(rows.tolist(), spans.of.tolist(), within, sizes, strict=True)
        }

    def close(self) -> None:
        """End the reading threads and close the files."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(self.store, KeptStore):
            self.store.close()

    def _block(self, number: int) -> Rows:
        assert self._cache is not None
        return self._cache.get(number, self._load_block)

    def _load_block(self, number: int) -> Rows:
        first = number * self.block
        return self.read_now(np.arange(first, min(first + self.block, len(self.places.size))))

    def _spans(self, rows: Ints) -> "_Spans":
        """Sorted rows, cut where the shard changes or the gap is too wide for one request."""
        shard, start, size = self.places.shard[rows], self.places.offset[rows], self.places.size[rows]
        gap = start[1:] - (start[:-1] + size[:-1])
        apart = (np.diff(shard) != 0) | (gap < 0) | (gap > GAP_BYTES)
        of = np.concatenate([[0], np.cumsum(apart)])
        first = np.concatenate([[True], apart])
        last = np.concatenate([apart, [True]])
        return _Spans(shard[first], start[first], (start + size)[last] - start[first], of)

    def _load(self, shard: int, start: int, size: int) -> bytes:
        name = self.places.shards[shard]
        try:
            return self.store.read(name, start=start, size=size)
        except NotFoundError as error:
            raise DataError(
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


class _Cache:
    """The most recently used blocks, at most `limit` bytes of crops; a block is loaded by one thread, once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = Lock()
        self._held = 0
        self._blocks: OrderedDict[int, Future[Rows]] = OrderedDict()

    def get(self, number: int, load: Callable[[int], Rows]) -> Rows:
        """The block, loaded by this thread or waited for; a failed load fails all who wait and is forgotten."""
        with self._lock:
            future = self._blocks.get(number)
            if future is not None:
                self._blocks.move_to_end(number)
            else:
                mine = self._blocks[number] = Future()
        if future is not None:
            return future.result()
        try:
            mine.set_result(load(number))
        except BaseException as error:
            with self._lock:
                del self._blocks[number]
            mine.set_exception(error)
            raise
        self._make_room(_size(mine))
        return mine.result()

    def _make_room(self, new: int) -> None:
        """Forget the least recently used blocks; those that are being loaded are not counted yet, and stay."""
        with self._lock:
            self._held += new
            for number in [number for number, future in self._blocks.items() if future.done()]:
                if self._held <= self.limit:
                    return
                self._held -= _size(self._blocks.pop(number))


def _size(block: Future[Rows]) -> int:
    return sum(map(len, block.result().values()))
