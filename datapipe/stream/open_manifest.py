"""A manifest opened for reading: its packed index, and the reader that suits where it lies and what may be cached."""

import logging
from collections.abc import Collection
from typing import NamedTuple

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import StorageError
from datapipe.core.randomness import Ints
from datapipe.core.warn_once import warn_once
from datapipe.dataset.manifest import Manifest
from datapipe.storage import is_remote, open_store
from datapipe.storage.local import OpenFilesStore
from datapipe.storage.pace import UNLIMITED, Pace
from datapipe.stream.block_reader import BlockReader, Cache, Places
from datapipe.stream.disk_cache import DiskCache, default_folder
from datapipe.stream.index_cache import open_index
from datapipe.stream.memory_cache import MemoryCache
from datapipe.stream.reading_plan import ALONE, Readers, ReadingPlan, plan_reading

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """One version of a data set. `pid` and `camera`: [rows], -1 where unknown."""

    manifest: Manifest
    reader: BlockReader
    pid: Ints
    camera: Ints


def open_manifest(
    manifest: Manifest, storage: StorageConfig, config: StreamConfig, readers: Readers = ALONE, *, beside: int = 0
) -> Opened:
    """Open the packed index, choose the cache, say what is slower than it could be. `readers`: all that read this data
    set together; `beside`: see `plan_reading`. Raises DataError that names an index which is missing or damaged, where
    there is no packed one yet."""
    remote = is_remote(manifest.url)
    store = open_store(manifest.url, storage) if remote else OpenFilesStore(manifest.url)
    index = open_index(manifest, store, storage, config.cache_dir or default_folder())
    places = Places(manifest.shards, index.starts, index.offset, index.size, index.xxh3, index.unit)
    plan = plan_reading(
        config, rows=manifest.rows, crop_bytes=index.jpeg_bytes / max(1, manifest.rows), remote=remote,
        machines=readers.machines, beside=beside,
    )  # fmt: skip
    for line in plan.advice():
        warn_once(log, f"{manifest.url}: {line}")
    cache = _cache(plan, manifest, index.replaced, config)
    reader = BlockReader(
        store, places, block=config.block, cache=cache, kept=plan.kept,
        ahead=plan.ahead if isinstance(cache, DiskCache) else None, in_flight=config.reads if remote else 0,
        pace=Pace(config.requests_per_s / readers.ranks) if remote else UNLIMITED,
    )  # fmt: skip
    return Opened(manifest, reader, index.pid, index.camera)


def _cache(plan: ReadingPlan, manifest: Manifest, replaced: Collection[str], config: StreamConfig) -> Cache | None:
    """What the plan keeps blocks in. `replaced`: sha256 of tars of which nothing may stay on this machine's disk. None
    where nothing is kept, or a folder that nobody chose cannot be used, which is told."""
    if plan.keeps == "memory":
        return MemoryCache(plan.limit)
    if plan.keeps == "nothing":
        return None
    try:
        disk = DiskCache(config.cache_dir or default_folder(), plan.limit)
    except StorageError as error:
        if config.cache_dir:
            raise
        log.warning("crops are read one by one from %s: %s", manifest.url, error)
        return None
    if replaced:
        disk.drop(replaced)
    return disk
