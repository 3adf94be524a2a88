"""Where the matches of every query come in its ranking, from distances that arrive a few queries at a time.

Nothing is sorted: the place of a match is one more than the number of gallery images that are nearer. Q queries, G
gallery images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from training.clustering.nearest import Chunk, Floats, Integers, in_slices, nearest
from training.reid.datasets.reid_set import JUNK

Flags = NDArray[np.bool_]

SAMPLED = 32
"""Matching pairs, and others, whose distances are kept of each query."""


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
    through: NDArray[np.int64] | None
    """[matches]: images that are as near as each match or nearer, itself among them, ascending; None: not asked for."""
    nearest: NDArray[np.int64]
    """[top_k]: gallery rows in order; -1 where there are no more."""
    nearest_distances: Floats
    """[top_k]: infinite where there are no more."""
    matching: Floats
    """Distances to matches, at most SAMPLED."""
    others: Floats
    """Distances to other people, at most SAMPLED."""


def rank(chunks: Iterable[Chunk], labels: Labels, *, top_k: int, threads: int, tied: bool = False) -> list[Ranking]:
    """Every query's ranking, the first `top_k` places of it; equal distances keep the order of the gallery. `tied`:
    count what is equally near, too."""
    return list(in_slices(chunks, _Ranker(labels, top_k, tied).rank, threads))


class _Ranker:
    def __init__(self, labels: Labels, top_k: int, tied: bool) -> None:
        self._labels, self._top_k, self._tied = labels, top_k, tied
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
            through=np.sort(np.array([np.count_nonzero(row <= row[at]) for at in matches], np.int64))
            if self._tied
            else None,
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
