"""Objects as readable files: seekable, fetched in large blocks, the next block already on its way."""

import io
from abc import abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.storage.store import Store
from datapipe.storage.urls import is_remote, open_store, split_url

STREAM_BYTES = 8 << 20
"""Most bytes that a stream asks for at a time; it holds two such blocks."""
FIRST_BYTES = 256 << 10
"""Bytes asked for after a jump; four times as many each time the reader goes on from there."""
BUFFER_BYTES = 64 << 10


def open_stream(
    url: str,
    mode: str = "rb",
    bufsize: int = STREAM_BYTES,
    config: StorageConfig = StorageConfig(),  # noqa: B008  (frozen)
) -> BinaryIO:
    """`open_object` by address.

    It has the signature of webdataset's openers, so that its library reads shards on S3:
    `from webdataset.gopen import gopen_schemes; gopen_schemes["s3"] = open_stream` (endpoint by AWS_ENDPOINT_URL, or
    `functools.partial(open_stream, config=StorageConfig(endpoint_url=...))`).
    """
    if mode != "rb":
        raise StorageError(f"streams are for reading, not {mode!r}", where=url)
    folder, name = split_url(url)
    return open_object(open_store(folder, config), name, block=max(bufsize, STREAM_BYTES))


def open_object(store: Store, name: str, *, block: int = STREAM_BYTES) -> BinaryIO:
    """A seekable file for zipfile, tarfile, pyarrow and the like, with the retries of the store. For one thread.

    Read in order, blocks grow to `block` bytes, and from remote stores the next one is fetched meanwhile; after a jump
    they begin small. Raises NotFoundError, and StorageError where the object becomes shorter.
    """
    return io.BufferedReader(_Object(store, name, block), BUFFER_BYTES)


class SeekableReader(io.RawIOBase):
    """A file to read of `total` bytes; what is made of it says which bytes come next, asked for `block` at most."""

    def __init__(self, total: int, block: int) -> None:
        self.total, self.block, self.position = total, block, 0

    @abstractmethod
    def next_bytes(self, most: int) -> bytes | memoryview:
        """At least one byte from `position` on, `most` at most; none at the end."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.total}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning of the object")  # as files do; zipfile counts on it
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:  # the inherited one would ask for 8 kB at a time
        return b"".join(iter(lambda: bytes(self._take(self.block)), b""))

    def _take(self, most: int) -> bytes | memoryview:
        data = self.next_bytes(most) if self.position < self.total else b""
        self.position += len(data)
        return data


class _Object(SeekableReader):
    def __init__(self, store: Store, name: str, block: int) -> None:
        super().__init__(store.size(name), block)
        self.store, self.name = store, name
        self._start, self._held = 0, memoryview(b"")
        self._size = min(FIRST_BYTES, block)
        self._ahead: Future[bytes] | None = None
        self._pool = ThreadPoolExecutor(1, "datapipe-ahead") if is_remote(store.url) else None

    def close(self) -> None:
        if not self.closed and self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def next_bytes(self, most: int) -> memoryview:
        if not self._start <= self.position < self._start + len(self._held):
            self._fetch()
        begin = self.position - self._start
        return self._held[begin : begin + most]

    def _fetch(self) -> None:
        """The block at the position, and an order for the one after it where the reader goes through in order."""
        ahead, self._ahead = self._ahead, None
        if self._held and self.position == self._start + len(self._held):
            self._size = min(4 * self._size, self.block)
            data = ahead.result() if ahead else self._read(self.position, self._size)
            if self._pool and self.position + len(data) < self.total:
                self._ahead = self._pool.submit(self._read, self.position + len(data), self._size)
        else:
            self._size = min(FIRST_BYTES, self.block)
            data = self._read(self.position, self._size)
        self._start, self._held = self.position, memoryview(data)

    def _read(self, start: int, size: int) -> bytes:
        wanted = min(size, self.total - start)
        data = self.store.read(self.name, start=start, size=wanted)
        if len(data) != wanted:
            raise StorageError("the object became shorter while it was read", where=self.store.address(self.name))
        return data
