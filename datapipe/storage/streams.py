"""Objects as readable files."""

import io
from typing import Any, BinaryIO

from datapipe.config import StorageConfig
from datapipe.errors import StorageError
from datapipe.storage.address import open_store, split_url
from datapipe.storage.store import Store

STREAM_BYTES = 8 << 20
"""Bytes that `open_stream` asks for at a time."""


def open_stream(
    url: str, mode: str = "rb", bufsize: int = STREAM_BYTES, config: StorageConfig = StorageConfig()
) -> BinaryIO:  # noqa: B008  (frozen)
    """An object as a readable file, fetched in large blocks with the retries of this module.

    It has the signature of webdataset's openers, so that its library reads shards on S3:
    `from webdataset.gopen import gopen_schemes; gopen_schemes["s3"] = open_stream` (endpoint by AWS_ENDPOINT_URL, or
    `functools.partial(open_stream, config=StorageConfig(endpoint_url=...))`).
    """
    if mode != "rb":
        raise StorageError(f"streams are for reading, not {mode!r}", where=url)
    folder, name = split_url(url)
    store = open_store(folder, config)
    return io.BufferedReader(_Blocks(store, name), max(bufsize, STREAM_BYTES))


class _Blocks(io.RawIOBase):
    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.total, self.position = store.size(name), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._next(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def readall(self) -> bytes:  # the inherited one would ask for 8 kB at a time
        return b"".join(iter(lambda: self._next(STREAM_BYTES), b""))

    def _next(self, most: int) -> bytes:
        wanted = min(most, self.total - self.position)
        block = self.store.read(self.name, start=self.position, size=wanted)
        if len(block) != wanted:
            raise StorageError("the object became shorter while it was read", where=self.store.address(self.name))
        self.position += wanted
        return block
