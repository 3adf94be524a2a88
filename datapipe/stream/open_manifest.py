"""A manifest opened for reading: its packed index, and the reader that suits where it lies and what may be cached."""

import logging
from collections.abc import Collection
from typing import NamedTuple

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import StorageError
from datapipe.core.randomness import Ints
from datapipe.dataset.manifest import Manifest
from datapipe.storage import is_remote, open_store
from datapipe.storage.local import OpenFilesStore
from datapipe.stream.block_reader import BlockReader, Cache, Places
from datapipe.stream.disk_cache import DiskCache, default_folder
from datapipe.stream.index_cache import open_index
from datapipe.stream.memory_cache import MemoryCache

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """One version of a data set. `pid` and `camera`: [rows], -1 where unknown."""

    manifest: Manifest
    reader: BlockReader
    pid: Ints
    camera: Ints


def open_manifest(manifest: Manifest, storage: StorageConfig, config: StreamConfig) -> Opened:
    """Open the packed index, choose the cache. Raises DataError that names an index which is missing or damaged, where
    there is no packed one yet."""
    remote = is_remote(manifest.url)
    store = open_store(manifest.url, storage) if remote else OpenFilesStore(manifest.url)
    index = open_index(manifest, store, storage, config.cache_dir or default_folder())
    places = Places(manifest.shards, index.starts, index.offset, index.size, index.xxh3, index.unit)
    window = int(index.jpeg_bytes / max(1, manifest.rows) * min(config.window * config.block, manifest.rows))
    cache = _cache(manifest, index.replaced, config, window) if remote else _memory(config, window)
    ahead = isinstance(cache, DiskCache) and 2 * window <= cache.limit
    reader = BlockReader(
        store, places, block=config.block, cache=cache, in_flight=config.reads if remote else 0, ahead=ahead
    )
    return Opened(manifest, reader, index.pid, index.camera)


def _memory(config: StreamConfig, window: int) -> Cache | None:
    """None where a window does not fit: blocks would be read again and again."""
    limit = int(config.cache_mb * 1e6)
    return MemoryCache(limit) if window <= limit else None


def _cache(manifest: Manifest, replaced: Collection[str], config: StreamConfig, window: int) -> Cache | None:
    """For a store that wants to be read in blocks: memory, else the disk of this machine, else none, which is told.
    `replaced`: sha256 of tars of which nothing may stay on that disk."""
    memory = _memory(config, window)
    if memory is not None:
        return memory
    limit = int(config.cache_gb * 1e9)
    if window > limit:
        log.warning(
            "crops are read one by one from %s: a window of %d MB fits neither into stream.cache_mb = %g nor into "
            "stream.cache_gb = %g", manifest.url, window // 10**6, config.cache_mb, config.cache_gb,
        )  # fmt: skip
        return None
    try:
        disk = DiskCache(config.cache_dir or default_folder(), limit)
    except StorageError as error:
        if config.cache_dir:
            raise
        log.warning("crops are read one by one from %s: %s", manifest.url, error)
        return None
    if replaced:
        disk.drop(replaced)
    return disk
