"""Pure: which crop goes to which shard, and in which order. The shards' bytes follow from the plan alone.

Crops are ordered by a keyed hash of their key, so that whoever reads the shards one after the other already gets them
shuffled, and cut into shards by count and by bytes.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute
import xxhash

from datapipe.config import ShardConfig
from datapipe.errors import DataError

BLOCK = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK
"""Two blocks of zeros end a tar."""
PLANNED = ("key", "size", "height", "width", "sha256", "xxh3", "dhash", "source", "name", "pid", "camera", "video",
           "track", "frame")
"""Columns of the scan that decide what is written."""


def sample_key(source: str, name: str) -> str:
    """32 hex digits for (source, original name): equal bytes under two names stay two samples."""
    text = f"{source}\0{name}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def rank(key: str, seed: int) -> int:
    """Where a crop sorts in the data set: a 64-bit hash of its key, keyed by the seed."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed & (2**64 - 1))


def member_bytes(sizes: np.ndarray) -> np.ndarray:
    """Bytes int64[n] that JPEGs of these sizes take in a tar: a header, and the data in whole blocks."""
    return BLOCK + (sizes.astype(np.int64) + BLOCK - 1) // BLOCK * BLOCK


@dataclass(frozen=True)
class Plan:
    """The crops of a scan in their final order, cut into shards."""

    scan: pyarrow.Table
    order: np.ndarray
    """int64[crops]: row of the scan at each place."""
    cuts: np.ndarray
    """int64[shards + 1]: shard s holds the places [cuts[s], cuts[s + 1])."""
    id: str
    """Hash (hex) of everything that is written: equal plans make equal shards."""

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.cuts) - 1

    def rows(self, shard: int) -> pyarrow.Table:
        """The scan's rows of one shard, in the order of the tar."""
        return self.scan.take(self.order[self.cuts[shard]:self.cuts[shard + 1]])

    def name(self, shard: int) -> str:
        """Name of a shard's tar: unlike that of any other plan."""
        return f"shards/{self.id[:12]}-{shard:06d}.tar"


def plan_shards(scan: pyarrow.Table, config: ShardConfig) -> Plan:
    """Order and cut the crops of a scan (columns `rank` and PLANNED at least), whatever the order it comes in.

    Raises DataError where two crops have the same source and name. Needs about 40 bytes per crop besides the scan.
    """
    order = pyarrow.compute.sort_indices(scan, sort_keys=[("rank", "ascending"), ("key", "ascending")]).to_numpy()
    order = order.astype(np.int64)
    _check_unique(scan, order)
    cuts = cut(scan["size"].to_numpy()[order], samples=config.samples_per_shard,
               most_bytes=int(config.shard_mb * 1e6))
    draft = Plan(scan, order, cuts, "")
    return Plan(scan, order, cuts, _digest(draft))


def cut(sizes: np.ndarray, *, samples: int, most_bytes: int) -> np.ndarray:
    """Places int64[shards + 1] where shards begin: as many crops as fit both bounds, and one at least."""
    ends = np.cumsum(member_bytes(sizes))
    cuts = [0]
    while cuts[-1] < len(sizes):
        start = cuts[-1]
        before = ends[start - 1] if start else 0
        fitting = int(np.searchsorted(ends, before + most_bytes - END_BYTES, side="right"))
        cuts.append(min(len(sizes), start + samples, max(start + 1, fitting)))
    return np.array(cuts, np.int64)


def _check_unique(scan: pyarrow.Table, order: np.ndarray) -> None:
    ranks = scan["rank"].to_numpy()[order]
    for place in np.flatnonzero(ranks[1:] == ranks[:-1]):
        first, second = (scan.slice(int(order[place + step]), 1).to_pylist()[0] for step in (0, 1))
        if first["key"] == second["key"]:
            raise DataError("two crops of one source have the same name", where=f"{first['source']}: {first['name']}",
                            hint="give each of them a name of its own, or leave one of the files out")


def _digest(plan: Plan) -> str:
    digest = hashlib.sha256(b"datapipe plan 1")
    for shard in range(plan.shards):
        digest.update(f"shard {plan.cuts[shard]}".encode())
        rows = plan.rows(shard).select(PLANNED).combine_chunks()
        for column in rows.columns:
            for part in _buffers(column):
                digest.update(part)
    return digest.hexdigest()


def _buffers(column: pyarrow.ChunkedArray) -> Iterator[bytes]:
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        yield "\0".join(column.to_pylist()).encode()
    elif pyarrow.types.is_fixed_size_binary(column.type):
        yield b"".join(column.to_pylist())
    else:
        yield column.to_numpy().tobytes()
