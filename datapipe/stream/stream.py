"""Sample ids -> checked JPEG bytes, with deterministic substitutes for broken ones.

Safe to call from many threads. Nothing waits without end: storage has its time limits, and a failed read fails every
thread that waits for it.
"""

import logging
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import numpy as np
import xxhash

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import DataError
from datapipe.core.randomness import Ints
from datapipe.dataset.manifest import Manifest
from datapipe.storage import open_store
from datapipe.stream.block_reader import BlockReader, MissingShardError
from datapipe.stream.open_manifest import Opened, open_manifest
from datapipe.stream.reading_plan import ALONE, Readers

log = logging.getLogger(__name__)

FEWEST_FOR_RATE = 1_000
"""The share of broken crops is taken of at least so many, so that the first one does not end a run."""


class Fetched(NamedTuple):
    """JPEG bytes, and the rows they are of: those asked for, or their substitutes. int64 [n]."""

    rows: Ints
    data: list[bytes]


class Stream:
    """The crops of a data set by sample id (row of the manifest). Fails at once if the packed index, or where there is
    none an index, cannot be read.

    A crop that fails its checksum or does not decode is replaced by the next row of its block (`StreamConfig.block`
    rows, cyclic), logged and counted in `replaced`. When a shard is missing because crops were removed meanwhile, the
    version that took its place, row for row, is read from then on: see `manifests`.
    """

    def __init__(
        self, manifest: Manifest, storage: StorageConfig, config: StreamConfig, readers: Readers = ALONE, *,
        beside: int = 0,
    ) -> None:  # fmt: skip
        """`readers`: all that read this data set together; `beside`: see `plan_reading`."""
        if not manifest.rows:
            raise DataError("the data set holds no crops", where=manifest.url, hint="look at its quarantine.parquet")
        self.rows: int = manifest.rows
        self.config, self.storage = config, storage
        self.replaced = 0
        self._readers, self._beside = readers, beside
        self._versions = [open_manifest(manifest, storage, config, readers, beside=beside)]
        self._lock = Lock()
        self._opening = Lock()
        self._broken: set[int] = set()
        self._fetched = 0

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The version that is read now, as the only one."""
        return (self._now.manifest,)

    @property
    def pid(self) -> Ints:
        """Identity of every row, -1 where unknown."""
        return self._now.pid

    @property
    def camera(self) -> Ints:
        """Camera of every row, -1 where unknown."""
        return self._now.camera

    def labels(self, rows: Ints) -> tuple[Ints, Ints]:
        """Identity and camera of these rows, -1 where unknown."""
        now = self._now
        return now.pid[rows], now.camera[rows]

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the storage so far."""
        return sum(version.reader.bytes_read for version in self._versions)

    @property
    def cached(self) -> tuple[int, int]:
        """(crops that came from the cache, of so many that were asked of it) so far."""
        readers = [version.reader for version in self._versions]
        return sum(reader.hits for reader in readers), sum(reader.reads for reader in readers)

    def fetch(self, samples: Ints) -> Fetched:
        """The checked crops of these samples. Raises DataError for a missing shard or too many broken crops."""
        fetched = self._from_newest(lambda reader: self._fetch(reader, samples))
        self._count(len(samples), int((fetched.rows != samples).sum()))
        return fetched

    def peek(self, samples: Ints) -> list[bytes]:
        """The checked crops of these samples, which do not count as seen by training. Raises as `fetch` does, but never
        for too many broken ones."""
        return self._from_newest(lambda reader: self._fetch(reader, samples)).data

    def replace(self, sample: int, row: int, reason: str) -> Fetched:
        """Another crop for `sample`, because `row`, which was fetched for it, is of no use: it does not decode."""
        self._condemn(row, reason)
        self._count(0, int(row == sample))
        return self._from_newest(lambda reader: self._fetch(reader, np.array([sample])))

    @property
    def renewed(self) -> int:
        """How often another version has taken the place of the one before."""
        return len(self._versions) - 1

    def renew(self) -> None:
        """Go over to the version that took the place of this one, if there is one."""
        with self._opening:
            self._succeed()

    @property
    def reads_ahead(self) -> bool:
        """Whether `prepare` does anything."""
        return self._now.reader.ahead is not None

    def prepare(self, samples: Ints, turns: Ints) -> None:
        """Bring in, in the background, the blocks of samples that will be wanted in turns: see `SampleOrder.turns`."""
        self._now.reader.prepare(samples, turns)

    def passed(self, samples: Ints, turns: Ints) -> None:
        """All batches before that of these samples are made: what only earlier turns needed may go."""
        self._now.reader.passed(turns)

    def close(self) -> None:
        """End the reading threads."""
        for version in self._versions:
            version.reader.close()

    @property
    def _now(self) -> Opened:
        return self._versions[-1]

    def _from_newest(self, work: Callable[[BlockReader], Fetched]) -> Fetched:
        """What `work` returns; done again with another version where this one's shards are gone."""
        while True:
            version = self._now
            try:
                return work(version.reader)
            except MissingShardError:
                with self._opening:
                    if version is self._now and not self._succeed():
                        raise

    def _succeed(self) -> bool:
        """`renew`, while nobody else does; was there one?"""
        successor = self._now.manifest.successor(open_store(self._now.manifest.url, self.storage))
        if successor is None:
            return False
        opened = open_manifest(successor, self.storage, self.config, self._readers, beside=self._beside)
        log.warning("crops were removed from the data set: %s is read from now on, row for row", successor.file)
        self._versions.append(opened)  # others may still read through the one before: it is closed at the end
        return True

    def _fetch(self, reader: BlockReader, samples: Ints) -> Fetched:
        wanted = [self._sound(sample) for sample in samples.tolist()] if self._broken else samples.tolist()
        data_of_row = reader.read(np.array(wanted, dtype=np.int64))
        promised = reader.places.xxh3[wanted].tolist()
        checked = [
            (row, data_of_row[row])
            if xxhash.xxh3_64_intdigest(data_of_row[row]) == hash_
            else self._checked(reader, row)
            for row, hash_ in zip(wanted, promised, strict=True)
        ]
        rows = np.array([row for row, _ in checked], dtype=np.int64)
        return Fetched(rows, [data for _, data in checked])

    def _checked(self, reader: BlockReader, row: int) -> tuple[int, bytes]:
        """The row and its bytes if they are what the index promises, else the first sound row after it and its."""
        sample = row
        while True:
            data = reader.read_anew(row)  # once more: they may have broken on the way
            if reader.places.matches(row, data):
                return row, data
            wanted = reader.places.size[row]
            self._condemn(row, "checksum" if len(data) == wanted else f"{len(data)} of {wanted} bytes")
            row = self._sound(sample)

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
        reader = self._now.reader
        return reader.store.address(reader.places.name(row))
