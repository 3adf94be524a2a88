"""Where the matches of every query come in its ranking, from distances that arrive a few queries at a time.

Nothing is sorted: the place of a match is one more than the number of gallery images that are nearer. Q queries, G
gallery images.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from training.reid.datasets.reid_set import JUNK

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
Flags = NDArray[np.bool_]
T = TypeVar("T")
Chunk = tuple[int, Floats]
"""(first query, distances [queries, G]); overwritten while it is ranked."""

SAMPLED = 32
"""Matching pairs, and others, whose distances are kept of each query."""
GROUP = 64
"""Neighbouring distances whose smallest one is looked at to find the nearest of all."""


@dataclass(frozen=True)
class Labels:
    """Who is on the images and which camera saw them; DataError where identities and cameras do not fit."""

    query_pids: Integers
    gallery_pids: Integers
    query_cameras: Integers
    gallery_cameras: Integers

    def __post_init__(self) -> None:
        for part, pids, cameras in (
            ("query", self.query_pids, self.query_cameras),
            ("gallery", self.gallery_pids, self.gallery_cameras),
        ):
            if pids.ndim != 1 or pids.shape != cameras.shape:
                raise DataError(f"{part}: {pids.shape} identities but {cameras.shape} cameras")


@dataclass(frozen=True)
class Ranking:
    """What is kept of one query's ranking; the query's own camera and junk are not in it."""

    places: NDArray[np.int64]
    """[matches]: 1-based, ascending."""
    nearest: NDArray[np.int64]
    """[top_k]: gallery rows in order; -1 where there are no more."""
    nearest_distances: Floats
    """[top_k]: infinite where there are no more."""
    matching: Floats
    """Distances to matches, at most SAMPLED."""
    others: Floats
    """Distances to other people, at most SAMPLED."""


def rank(chunks: Iterable[Chunk], labels: Labels, *, top_k: int, threads: int) -> list[Ranking]:
    """Every query's ranking, the first `top_k` places of it; equal distances keep the order of the gallery."""
    return list(in_slices(chunks, _Ranker(labels, top_k).rank, threads))


def distance_chunks(these: Floats, those: Floats, chunk_mb: float) -> Iterator[Chunk]:
    """Squared Euclidean distances of unit rows [Q, C] to [G, C], less 2; one buffer, overwritten by the next chunk."""
    rows = max(1, min(len(these), int(chunk_mb * 1e6 / max(1, those.itemsize * len(those)))))
    buffer = np.empty((rows, len(those)), those.dtype)
    for start in range(0, len(these), rows):
        part = these[start : start + rows]
        yield start, np.matmul(-2 * part, those.T, out=buffer[: len(part)])


def in_slices(chunks: Iterable[Chunk], work: Callable[[int, Floats], list[T]], threads: int) -> Iterator[T]:
    """What `work(first query, distances)` makes of the chunks, in order; each is cut among the threads.

    numpy compares and counts without the interpreter's lock.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for start, block in chunks:
            cuts = np.linspace(0, len(block), threads + 1).astype(int).tolist()
            parts = pool.map(work, [start + low for low in cuts[:-1]], np.split(block, cuts[1:-1]))
            yield from chain.from_iterable(parts)


def nearest(row: Floats, top_k: int) -> NDArray[np.int64]:
    """[top_k]: places of the smallest finite numbers in ascending order, equal ones in theirs; -1 where there are no
    more."""
    first = np.full(top_k, -1, np.int64)
    if top_k:
        candidates = np.flatnonzero((row <= _border(row, top_k)) & (row < np.inf))
        best = candidates[np.argsort(row[candidates], kind="stable")][:top_k]
        first[: len(best)] = best
    return first


def _border(row: Floats, top_k: int) -> np.floating | float:
    """At least `top_k` numbers are no larger, and not many more: the top_k-th smallest of the groups' smallest."""
    groups = np.minimum.reduceat(row, np.arange(0, len(row), GROUP))
    if top_k < len(groups):
        return np.partition(groups, top_k - 1)[top_k - 1]
    return np.partition(row, top_k - 1)[top_k - 1] if top_k < len(row) else np.inf


class _Ranker:
    def __init__(self, labels: Labels, top_k: int) -> None:
        self._labels, self._top_k = labels, top_k
        self._by_identity = np.argsort(labels.gallery_pids, kind="stable")
        self._sorted_pids = labels.gallery_pids[self._by_identity]
        self._junk = np.flatnonzero(labels.gallery_pids == JUNK)
        gallery = len(labels.gallery_pids)
        self._sample = np.arange(min(SAMPLED, gallery)) * max(1, gallery // SAMPLED)

    def rank(self, first: int, block: Floats) -> list[Ranking]:
        scratch = np.empty(block.shape[1:], bool)  # made anew for every comparison, it would take as long as these
        return [self._ranking(query, row, scratch) for query, row in enumerate(block, start=first)]

    def _ranking(self, query: int, row: Floats, scratch: Flags) -> Ranking:
        pid = self._labels.query_pids[query]
        start, end = np.searchsorted(self._sorted_pids, [pid, pid + 1])
        same = self._by_identity[start:end]
        other_camera = self._labels.gallery_cameras[same] != self._labels.query_cameras[query]
        row[same[~other_camera]] = np.inf
        row[self._junk] = np.inf
        matches = same[other_camera] if pid != JUNK else same[:0]
        first = nearest(row, self._top_k)
        return Ranking(
            places=_places(row, matches, scratch),
            nearest=first,
            nearest_distances=np.where(first >= 0, row[first], np.inf).astype(row.dtype),
            matching=row[matches[:: -(-len(matches) // SAMPLED) or 1]],
            others=self._others(query, pid, row),
        )

    def _others(self, query: int, pid: np.integer, row: Floats) -> Floats:
        """Distances of other people's gallery images that lie evenly apart, other ones for each query."""
        sample = (self._sample + query) % len(row)
        distances = row[sample]
        return distances[(self._labels.gallery_pids[sample] != pid) & (distances < np.inf)]


def _places(row: Floats, matches: Integers, scratch: Flags) -> NDArray[np.int64]:
    """1-based places of the matches in the stable ranking, ascending: one more than the nearer images, and the equally
    near ones before it. `scratch` [G] is overwritten."""
    if not len(matches):
        return np.empty(0, np.int64)
    near = np.less_equal(row, row[matches].max(), out=scratch)
    if np.count_nonzero(near) < len(row) // 8:  # good features: all that matters lies among a few
        kept = np.flatnonzero(near)
        row, matches, scratch = row[kept], np.searchsorted(kept, matches), scratch[: len(kept)]
    places = np.array([_place(row, int(at), scratch) for at in matches], np.int64)
    places.sort()
    return places


def _place(row: Floats, at: int, scratch: Flags) -> int:
    np.less_equal(row[:at], row[at], out=scratch[:at])
    scratch[at] = True  # itself: places begin with 1
    np.less(row[at + 1 :], row[at], out=scratch[at + 1 :])
    return int(np.count_nonzero(scratch))
