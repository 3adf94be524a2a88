"""Sample ids -> checked JPEG bytes, with deterministic substitutes for broken ones.

Safe to call from many threads. Nothing waits without end: storage has its time limits, and a failed read fails every
thread that waits for it.
"""

import logging
from threading import Lock
from typing import NamedTuple

import numpy as np
import xxhash

from datapipe.blocks import Places, Reader
from datapipe.config import StorageConfig, StreamConfig
from datapipe.errors import DataError
from datapipe.manifest import ORDINAL, Manifest
from datapipe.randomness import Ints
from datapipe.storage import is_remote, open_store
from datapipe.storage.kept import KeptStore

log = logging.getLogger(__name__)

FEWEST_FOR_RATE = 1_000
"""The share of broken crops is taken of at least so many, so that the first one does not end a run."""


class Fetched(NamedTuple):
    """JPEG bytes, and the rows they are of: those asked for, or their substitutes. int64 [n]."""

    rows: Ints
    data: list[bytes]


class Stream:
    """The crops of a data set by sample id (row of the manifest). Fails at once if an index cannot be read.

    `pid` and `camera` are arrays over all rows, -1 where unknown. A crop that fails its checksum or does not decode
    is replaced by the next row of its block (`StreamConfig.block` rows, cyclic), logged and counted in `replaced`.
    """

    def __init__(self, manifest: Manifest, storage: StorageConfig, config: StreamConfig) -> None:
        if not manifest.rows:
            raise DataError("the data set holds no crops", where=manifest.url, hint="look at its quarantine.parquet")
        self.rows: int = manifest.rows
        self.config = config
        self.replaced = 0
        table = manifest.table([ORDINAL, "offset", "size", "xxh3", "pid", "camera"], storage)
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        self.pid, self.camera, self._xxh3 = columns["pid"], columns["camera"], columns["xxh3"]
        self._places = Places(
            [shard.name for shard in manifest.shards], columns[ORDINAL], columns["offset"], columns["size"]
        )
        self._reader = Reader(
            open_store(manifest.url, storage) if is_remote(manifest.url) else KeptStore(manifest.url),
            self._places,
            block=config.block,
            keep_bytes=self._bytes_to_keep(manifest.url),
            in_flight=config.reads if is_remote(manifest.url) else 0,
        )
        self._lock = Lock()
        self._broken: set[int] = set()
        self._fetched = 0

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the storage so far."""
        return self._reader.bytes_read

    def fetch(self, samples: Ints) -> Fetched:
        """The checked crops of these samples. Raises DataError for a missing shard or too many broken crops."""
        wanted = [self._sound(sample) for sample in samples.tolist()] if self._broken else samples.tolist()
        found = self._reader.read(np.array(wanted, dtype=np.int64))
        promised = self._xxh3[wanted].tolist()
        checked = [
            (row, found[row]) if xxhash.xxh3_64_intdigest(found[row]) == hash_ else self._checked(row, found[row])
            for row, hash_ in zip(wanted, promised, strict=True)
        ]
        rows = np.array([row for row, _ in checked], dtype=np.int64)
        self._count(len(rows), int((rows != samples).sum()))
        return Fetched(rows, [data for _, data in checked])

    def replace(self, sample: int, row: int, reason: str) -> Fetched:
        """Another crop for `sample`, because `row`, which was fetched for it, is of no use: it does not decode."""
        self._condemn(row, reason)
        self._count(0, int(row == sample))
        substitute = self._sound(sample)
        substitute, data = self._checked(substitute, self._reader.read_now(np.array([substitute]))[substitute])
        return Fetched(np.array([substitute]), [data])

    def close(self) -> None:
        """End the reading threads."""
        self._reader.close()

    def _bytes_to_keep(self, url: str) -> int:
        """All of `cache_mb` where a window fits into it; else nothing, as blocks would be read again and again."""
        keep = int(self.config.cache_mb * 1e6)
        window = int(self._places.size.mean() * min(self.config.window * self.config.block, self.rows))
        if window <= keep:
            return keep
        if is_remote(url):
            log.warning(
                "crops are read one by one from %s: a window of %d MB does not fit into stream.cache_mb = %d",
                url,
                window // 10**6,
                self.config.cache_mb,
            )
        return 0

    def _checked(self, row: int, data: bytes) -> tuple[int, bytes]:
        """The row and these bytes if they are what the index promises, else the first sound row after it and its."""
        sample = row
        while not self._matches(row, data):
            data = self._reader.read_now(np.array([row]))[row]  # once more: they may have broken on the way
            if self._matches(row, data):
                break
            wanted = self._places.size[row]
            self._condemn(row, "checksum" if len(data) == wanted else f"{len(data)} of {wanted} bytes")
            row = self._sound(sample)
            data = self._reader.read_now(np.array([row]))[row]
        return row, data

    def _matches(self, row: int, data: bytes) -> bool:
        return xxhash.xxh3_64_intdigest(data) == int(self._xxh3[row])

    def _condemn(self, row: int, reason: str) -> None:
        with self._lock:
            if row in self._broken:
                return
            self._broken.add(row)
        log.warning(
            "crop %d in %s is broken (%s): the next one of its block takes its place", row, self._where(row), reason
        )

    def _sound(self, sample: int) -> int:
        """The sample itself or the next row of its block that is not known to be broken."""
        first = sample - sample % self.config.block
        size = min(self.config.block, self.rows - first)
        for step in range(size):
            row = first + (sample - first + step) % size
            if row not in self._broken:
                return row
        raise DataError(
            f"none of the {size} crops from number {first} on can be used",
            where=self._where(sample),
            hint="`python -m datapipe verify` says which shards are damaged; copy them again or shard again",
        )

    def _count(self, fetched: int, replaced: int) -> None:
        with self._lock:
            self._fetched += fetched
            self.replaced += replaced
            broken, total = self.replaced, self._fetched
        if broken > self.config.max_bad * max(total, FEWEST_FOR_RATE):
            raise DataError(
                f"{broken} of the {total} crops read so far are broken: stream.max_bad allows "
                f"{self.config.max_bad:.2%}, taken of at least {FEWEST_FOR_RATE}",
                where=f"{self._where(min(self._broken))} (crop {min(self._broken)}, among others)",
                hint="`python -m datapipe verify` says what is damaged; a larger stream.max_bad goes on regardless",
            )

    def _where(self, row: int) -> str:
        return self._reader.store.address(self._places.name(row))
