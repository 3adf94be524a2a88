"""Pure: which crop goes to which shard, and in which order. The shards' bytes follow from the plan alone.

Crops are ordered by a keyed hash of their key, so that whoever reads the shards one after the other already gets them
shuffled, and cut into shards by count and by bytes. What the plan needs of a crop are 76 bytes (`Candidates`): those
of 100 million crops fit into the memory of one machine. All else stays where the scan put it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow
import xxhash

from datapipe.core.config import ShardConfig
from datapipe.dataset.duplicates import Marks, exact_duplicates, near_duplicates
from datapipe.dataset.tar import END_BYTES

Within = Literal["source", "track", "none"]
HOT = pyarrow.schema(
    [
        ("rank", pyarrow.uint64()),  # place in the data set's order, before ties
        ("group", pyarrow.uint64()),  # crops of one group are looked through for near duplicates; 0: not looked at
        ("facts", pyarrow.uint64()),  # hash of what the index says besides key, bytes and perceptual hash
        ("taken", pyarrow.int64()),  # bytes in the tar, headers and sidecar included
    ]
)
"""What the plan needs of a crop besides key, sha256 and dhash."""
_CHUNK = 1 << 20


def sample_key(source: str, name: str) -> str:
    """32 hex digits for (source, original name): equal bytes under two names stay two samples."""
    text = f"{source}\0{name}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def rank(key: str, seed: int) -> int:
    """Where a crop sorts in the data set: a 64-bit hash of its key, keyed by the seed."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed & (2**64 - 1))


def hot_columns(rows: pyarrow.Table, taken: np.ndarray, *, seed: int, near_within: Within) -> pyarrow.Table:
    """The columns HOT of crops with the columns of an index. `taken`: bytes of each in the tar, int64[n]."""
    labels = list(zip(*(rows[name].to_pylist() for name in ("source", "video", "track")), strict=True))
    groups = {label: _group(label, near_within) for label in set(labels)}
    others = [rows[name].to_pylist() for name in ("height", "width", "pid", "camera", "video", "track", "frame")]
    return pyarrow.table(
        {
            "rank": [rank(key, seed) for key in rows["key"].to_pylist()],
            "group": [groups[label] for label in labels],
            "facts": [xxhash.xxh3_64_intdigest(repr(facts).encode()) for facts in zip(*others, strict=True)],
            "taken": taken,
        },
        schema=HOT,
    )


def _group(label: tuple[str, str, int], within: Within) -> int:
    source, video, track = label
    if within == "none" or (within == "track" and track < 0):
        return 0
    return xxhash.xxh3_64_intdigest(repr(source if within == "source" else label).encode()) or 1


@dataclass(frozen=True)
class Candidates:
    """Crops that may go into shards, as columns of equal length."""

    rank: np.ndarray
    key: np.ndarray
    """uint64[n, 2]: the 16 bytes of the key, first byte highest."""
    content: np.ndarray
    """uint64[n, 2]: the first 16 bytes of the sha256."""
    dhash: np.ndarray
    group: np.ndarray
    facts: np.ndarray
    taken: np.ndarray

    @staticmethod
    def room(count: int) -> "Candidates":
        """Columns to be filled with `put`."""
        rank, dhash, group, facts = (np.empty(count, np.uint64) for _ in range(4))
        key, content = (np.empty((count, 2), np.uint64) for _ in range(2))
        return Candidates(rank, key, content, dhash, group, facts, taken=np.empty(count, np.int64))

    def put(self, start: int, rows: pyarrow.Table) -> None:
        """Fill the rows from `start` on from a table with the columns `key`, `sha256`, `dhash` and HOT."""
        end = start + rows.num_rows
        self.key[start:end] = key_words(rows["key"])
        self.content[start:end] = _words(b"".join(rows["sha256"].to_pylist()), 32)
        for name in ("dhash", *HOT.names):
            getattr(self, name)[start:end] = rows[name].to_numpy()

    def __len__(self) -> int:
        return len(self.rank)


def key_words(keys: Any) -> np.ndarray:
    """Keys (an Arrow column of hex digits) as uint64[n, 2]."""
    return _words(bytes.fromhex("".join(keys.to_pylist())), 16)


def key_texts(words: np.ndarray) -> list[str]:
    """The inverse of `key_words`."""
    digits = words.astype(">u8").tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def _words(data: bytes, width: int) -> np.ndarray:
    """The first 16 of each `width` bytes as uint64[n, 2]."""
    return np.frombuffer(data, ">u8").reshape(-1, width // 8)[:, :2]


MOST_TOGETHER = 1_000
"""Shards that lie under one prefix, at most: of 10 million crops, as a rule."""
PREFIXES = 256
"""Over which more of them are spread: S3 answers 5,500 reads a second of each."""


@dataclass(frozen=True)
class Plan:
    """The crops in their final order, cut into shards. Rows are those of the candidates."""

    order: np.ndarray
    """int[crops]: row of the candidates at each place. Crops that were excluded have no place."""
    cuts: np.ndarray
    """int64[shards + 1]: shard s holds the places [cuts[s], cuts[s + 1])."""
    exact: Marks
    """Rows with the same bytes as another one."""
    near: Marks
    """Rows that look like another one of their group."""
    bytes: int
    """Bytes of all tars without their end blocks."""
    id: str
    """Hash (hex) of everything that is written: equal plans make equal shards."""

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.cuts) - 1

    def name(self, shard: int) -> str:
        """Name of a shard's tar: unlike that of any other plan. Many shards are spread over PREFIXES, as object stores
        limit the requests per second of each; few lie side by side. What lies where the manifest says."""
        folder = f"{shard % PREFIXES:02x}/" if self.shards > MOST_TOGETHER else ""
        return f"shards/{folder}{self._file(shard)}"

    def together(self, shard: int) -> str:
        """The name that a shard's tar had in earlier versions of this project, however many there were."""
        return f"shards/{self._file(shard)}"

    def _file(self, shard: int) -> str:
        return f"{self.id[:12]}-{shard:06d}.tar"


def plan_shards(crops: Candidates, config: ShardConfig) -> Plan:
    """Order and cut crops of different keys (see `repeated`), whatever the order they come in.

    What is excluded as an exact duplicate is not looked at as a near one, nor as the original of one.
    """
    order = ranked(crops)
    exact = _in_rows(exact_duplicates(crops.content[order]), order)
    if config.exclude != "none":
        order = _without(exact, order)
    near = _in_rows(near_duplicates(crops.dhash[order], crops.group[order]), order)
    if config.exclude == "near":
        order = _without(near, order)
    taken = crops.taken[order]
    cuts = cut(taken, samples=config.samples_per_shard, most_bytes=int(config.shard_mb * 1e6))
    return Plan(order, cuts, exact, near, int(taken.sum()), _digest(crops, order, cuts, (exact, near)))


def places(order: np.ndarray, count: int) -> np.ndarray:
    """The place of each of `count` rows, int64; -1 for those that have none."""
    position = np.full(count, -1, np.int64)
    position[order] = np.arange(len(order))
    return position


def _in_rows(marks: Marks, order: np.ndarray) -> Marks:
    """Marks of places as marks of rows."""
    rows, originals = order[marks.places], order[marks.originals]
    ascending = np.argsort(rows)
    return Marks(rows[ascending], originals[ascending])


def _without(marks: Marks, order: np.ndarray) -> np.ndarray:
    stays = np.ones(int(order.max(initial=-1)) + 1, bool)
    stays[marks.places] = False
    return order[stays[order]]


def ranked(crops: Candidates) -> np.ndarray:
    """Rows int[n] in the order of their ranks, those of equal rank in the order of their keys."""
    order = np.argsort(crops.rank).astype(np.int32 if len(crops) < 1 << 31 else np.int64)
    for tie in _ties(crops.rank, order):
        order[tie] = order[tie][np.lexsort((crops.key[order[tie], 1], crops.key[order[tie], 0]))]
    return order


def repeated(crops: Candidates) -> int | None:
    """The row of a crop whose key another crop has as well, the first one in the order; None: all are different."""
    order = ranked(crops)
    for tie in _ties(crops.rank, order):
        keys = crops.key[order[tie]]
        same = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1))
        if len(same):
            return int(order[tie][same[0]])
    return None


def _ties(ranks: np.ndarray, order: np.ndarray) -> Iterator[slice]:
    """Stretches of the order with equal ranks."""
    arranged = ranks[order]
    equal = np.flatnonzero(arranged[1:] == arranged[:-1])
    for first in equal[np.diff(equal, prepend=-2) > 1].tolist():
        end = int(np.searchsorted(arranged, arranged[first], side="right"))
        yield slice(first, end)


def cut(taken: np.ndarray, *, samples: int, most_bytes: int) -> np.ndarray:
    """Places int64[shards + 1] where shards begin: as many crops as fit both bounds, and one at least."""
    ends = np.cumsum(taken)
    cuts = [0]
    while cuts[-1] < len(taken):
        start = cuts[-1]
        before = ends[start - 1] if start else 0
        fitting = int(np.searchsorted(ends, before + most_bytes - END_BYTES, side="right"))
        cuts.append(min(len(taken), start + samples, max(start + 1, fitting)))
    return np.array(cuts, np.int64)


def _digest(crops: Candidates, order: np.ndarray, cuts: np.ndarray, marks: tuple[Marks, ...]) -> str:
    """Hash of all crops in their order, the cuts and the marks; independent of the numbers of the rows."""
    digest = hashlib.sha256(b"datapipe plan 2" + cuts.tobytes())
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        for column in (crops.key, crops.content, crops.dhash, crops.facts, crops.taken):
            digest.update(column[rows].tobytes())
    place = places(order, len(crops))
    for rows, originals in marks:
        present = place[rows] >= 0
        marked = np.stack([place[rows[present]], place[originals[present]]], axis=1)
        digest.update(b"marks" + marked[np.argsort(marked[:, 0])].tobytes())
    return digest.hexdigest()
