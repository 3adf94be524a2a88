"""Blocks in this process's memory: the most recently used ones, up to a limit."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock

from datapipe.stream.disk_cache import ByteRange


class MemoryCache:
    """At most `limit` bytes of blocks; a block is fetched by one thread, once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = Lock()
        self._held = 0
        self._blocks: OrderedDict[str, Future[bytes]] = OrderedDict()

    def held(self, key: str, parts: Sequence[ByteRange]) -> list[bytes] | None:
        """These parts of a block; None where it is not there yet."""
        with self._lock:
            future = self._blocks.get(key)
            if future is None or not future.done():
                return None
            self._blocks.move_to_end(key)
        return _cut(future.result(), parts)

    def has(self, key: str) -> bool:
        """Whether the block is there or on its way."""
        return key in self._blocks

    def load(self, key: str, parts: Sequence[ByteRange], fetch: Callable[[], bytes]) -> list[bytes]:
        """These parts of a block that was not held, fetched by this thread or waited for; a failed fetch fails all who
        wait and is forgotten."""
        with self._lock:
            future = self._blocks.get(key)
            if future is None:
                mine = self._blocks[key] = Future()
        if future is not None:
            return _cut(future.result(), parts)
        try:
            mine.set_result(fetch())
        except BaseException as error:
            with self._lock:
                del self._blocks[key]
            mine.set_exception(error)
            raise
        self._make_room(len(mine.result()))
        return _cut(mine.result(), parts)

    def keep(self, key: str) -> None:
        """A block that may be there will be wanted."""
        self._move(key, last=True)

    def retire(self, key: str) -> None:
        """A block is not wanted for long: it goes first."""
        self._move(key, last=False)

    def _move(self, key: str, *, last: bool) -> None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key, last=last)

    def forget(self, key: str) -> None:
        """Drop a block; its bytes were found to be wrong."""
        with self._lock:
            future = self._blocks.get(key)
            if future is not None and future.done():
                self._held -= len(self._blocks.pop(key).result())

    def _make_room(self, new: int) -> None:
        """Forget the least recently used blocks; those that are being fetched are not counted yet, and stay."""
        with self._lock:
            self._held += new
            for key in [key for key, future in self._blocks.items() if future.done()]:
                if self._held <= self.limit:
                    return
                self._held -= len(self._blocks.pop(key).result())


def _cut(block: bytes, parts: Sequence[ByteRange]) -> list[bytes]:
    return [block[start : start + size] for start, size in parts]
