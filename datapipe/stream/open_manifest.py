"""A manifest opened for reading: its labels, and the reader that suits where it lies and how much may be cached."""

import logging
from typing import NamedTuple

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import StorageError
from datapipe.core.randomness import Ints
from datapipe.dataset.manifest import ORDINAL, Manifest
from datapipe.storage import Store, is_remote, open_store
from datapipe.storage.local import OpenFilesStore
from datapipe.stream.block_reader import BlockReader, Cache, Places
from datapipe.stream.disk_cache import DiskCache, default_folder
from datapipe.stream.memory_cache import MemoryCache

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """One version of a data set. `pid` and `camera`: [rows], -1 where unknown."""

    manifest: Manifest
    reader: BlockReader
    pid: Ints
    camera: Ints


def open_manifest(manifest: Manifest, storage: StorageConfig, config: StreamConfig) -> Opened:
    """Read the indexes, choose the cache. Raises DataError that names an index which is missing or damaged."""
    table = manifest.table([ORDINAL, "offset", "size", "xxh3", "pid", "camera"], storage)
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    places = Places(manifest.shards, columns[ORDINAL], columns["offset"], columns["size"], columns["xxh3"])
    remote = is_remote(manifest.url)
    store = open_store(manifest.url, storage) if remote else OpenFilesStore(manifest.url)
    window = int(places.size.mean() * min(config.window * config.block, manifest.rows))
    cache = _cache(manifest, store, config, window) if remote else _memory(config, window)
    ahead = isinstance(cache, DiskCache) and 2 * window <= cache.limit
    reader = BlockReader(
        store, places, block=config.block, cache=cache, in_flight=config.reads if remote else 0, ahead=ahead
    )
    return Opened(manifest, reader, columns["pid"], columns["camera"])


def _memory(config: StreamConfig, window: int) -> Cache | None:
    """None where a window does not fit: blocks would be read again and again."""
    limit = int(config.cache_mb * 1e6)
    return MemoryCache(limit) if window <= limit else None


def _cache(manifest: Manifest, store: Store, config: StreamConfig, window: int) -> Cache | None:
    """For a store that wants to be read in blocks: memory, else the disk of this machine, else none, which is told."""
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
    disk.drop(_replaced_shards(manifest, store))
    return disk


def _replaced_shards(manifest: Manifest, store: Store) -> set[str]:
    """sha256 of shards that only versions hold which this one took the place of: crops were removed from them."""
    kept = {shard.sha256 for shard in manifest.shards}
    before = (version for version in Manifest.versions(store) if version.id in manifest.replaces)
    return {shard.sha256 for version in before for shard in version.shards} - kept
