"""Jaccard distance of k-reciprocal neighbourhoods, for the pairs of images that are near to each other alone.

Equal to `compute_jaccard_distance` of cluster-contrast (clustercontrast/utils/faiss_rerank.py:30), which PASS and
TransReID-SSL use as it is, in memory that grows with the number of images instead of its square.

With memberships V, whose rows have the sum 1, the distance is d = 1 - m / (2 - m) with m(i, j) = sum_c min(V_ic, V_jc).
So d <= eps where m >= 2 (1 - eps) / (2 - eps), and pairs that may have so much in common are found first: for many rows
at a time, the entries that follow each of theirs in its column are looked up, cut to its size, and added up by pair in
a sparse product, without a step of Python per row. N images, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array

from datapipe.core.errors import DataError
from datapipe.core.parallel import in_order
from datapipe.core.progress import QUIET_S, Progress
from training.clustering.k_reciprocal import memberships
from training.clustering.nearest import CHUNK_MB, Floats, Integers, nearest_neighbours, refuse_unfit
from training.clustering.settings import ClusteringConfig

TERMS = 500_000
"""Terms of the sums over the columns that one thread forms at once; each takes about 30 bytes."""
PAIRS = 10_000
"""Pairs of rows that one thread compares at once; each takes about 24 bytes for each entry of a row."""
LEFT_OUT = 0.75
"""How much of what near rows have in common at least may be left out of a row for finding candidates: the more, the
fewer terms and the more candidates."""
ROUNDING = 1e-5
"""By how much sums of a row's float32 weights may be off."""
MOST_NEAR = 50
"""Times k1: the neighbours of an image, on average, beyond which features are refused as collapsed. Distinct ones have
a few k1 at most, and the graph of equal ones would be as large as a matrix."""


def jaccard_neighbours(
    features: Floats,
    config: ClusteringConfig,
    *,
    threads: int = 2,
    chunk_mb: float = CHUNK_MB,
    label: str = "cluster",
) -> csr_array:
    """[N, N], sparse and symmetric: the Jaccard distance of all pairs of images that are at most `config.eps` apart;
    the diagonal is stored, too, and is 0.

    Features [N, C] are used as they are, of whatever length; float32 or float64, which is the precision of all that
    follows (what is lower is raised to float32). The image itself is the first of its k1 nearest, whatever its exact
    duplicates. `chunk_mb`: products held at once. `label`: what its progress is called.
    Errors: DataError for fewer images than k1, for features that are not finite, and for those that have collapsed
    onto each other.
    """
    features = np.asarray(features)
    refuse_unfit(features, "features")
    if len(features) < config.k1:
        raise DataError(
            f"fewer images than k1: {len(features)} images, and k1 = {config.k1} nearest ones of each are wanted",
            hint="more images, or a smaller k1",
        )
    features = features.astype(np.result_type(features, np.float32), copy=False)
    nearest = nearest_neighbours(features, config.k1, chunk_mb=chunk_mb, threads=threads, label=f"{label}, neighbours")
    members = memberships(
        features, nearest, k1=config.k1, k2=config.k2, threads=threads, label=f"{label}, neighbourhoods"
    )
    most = MOST_NEAR * config.k1 * len(features)
    return near_pairs(members, config.eps, most=most, threads=threads, label=f"{label}, distances")


def near_pairs(members: csr_array, eps: float, *, most: int, threads: int, label: str) -> csr_array:
    """[N, N], sparse and symmetric: Jaccard distances of the pairs of rows of sum 1 that are at most `eps` < 1 apart,
    and a diagonal of zeros. DataError when there are more than `most` entries."""
    members = _common_first(members)
    probe = _Probe.of(members, 2 * (1 - eps) / (2 - eps))
    parts: list[tuple[Integers, Integers, Floats]] = []
    images, found = members.shape[0], 0

    def work(rows: tuple[int, int]) -> tuple[int, tuple[Integers, Integers, Floats]]:
        row, column = probe.candidates(rows)
        distances = _distances(members, row, column)
        near = np.flatnonzero(distances <= eps)
        return rows[1] - rows[0], (row[near], column[near], distances[near])

    with Progress(label, images, unit="images", quiet_s=QUIET_S) as progress:
        for _, part in progress.over(in_order(work, probe.blocks(), threads=threads), lambda done: done[0]):
            parts.append(part)
            found += 2 * len(part[0])
            if found > most:
                raise DataError(
                    f"the features have collapsed: more than {most // images:,} of {images:,} images are within a "
                    f"Jaccard distance of {eps:g} of an image on average",
                    hint="look whether the weights are broken and images differ; a smaller eps keeps fewer pairs",
                )
    row, column, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    diagonal = np.arange(images, dtype=np.int32)
    places = (np.concatenate([row, column, diagonal]), np.concatenate([column, row, diagonal]))
    values = np.concatenate([distances, distances, np.zeros(images, distances.dtype)])
    return coo_array((values, places), shape=members.shape).tocsr()


@dataclass(frozen=True)
class _Probe:
    """What finds the pairs that may be near: the entries of rows in their rarer columns, by row and by column at once.

    Columns are ordered by how many rows have an entry there, the most common first. The first entries of each row are
    left out, as far as their sum is at most a share of what near rows have in common. Of two rows take the one of which
    more columns of that order are passed over: where both have an entry further on, it is kept of both, and before that
    they have no more in common than the sum of what is left out of this one.

    "Place" of an entry: its place when the kept ones are listed column by column.
    """

    kept: csr_array
    """[N, N]"""
    least: float
    """What the kept entries of near rows have in common at least."""
    rows: Integers
    """[entries]: row of the kept entry at each place; ascending within a column."""
    values: Floats
    """[entries]: the kept entry at each place."""
    places: Integers
    """[entries]: place of each entry of `kept`."""
    below: Integers
    """[entries]: how many entries of its column follow each entry of `kept`."""

    @staticmethod
    def of(members: csr_array, least: float) -> "_Probe":
        """`members`: in each row the most common columns come first. `least`: what near rows have in common."""
        row = np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))
        sums = np.concatenate([[0], np.cumsum(members.data, dtype=np.float64)])
        is_left_out = sums[1:] - sums[members.indptr[row]] <= LEFT_OUT * least
        starts = np.concatenate([[0], np.cumsum(~is_left_out)])[members.indptr]
        kept = csr_array((members.data[~is_left_out], members.indices[~is_left_out], starts), shape=members.shape)
        entries = np.arange(kept.nnz, dtype=kept.indptr.dtype)
        by_column = csr_array((entries, kept.indices, kept.indptr), shape=kept.shape).tocsc()
        places = np.empty_like(entries)
        places[by_column.data] = entries
        below = by_column.indptr[kept.indices + 1] - places - 1
        return _Probe(
            kept, (1 - LEFT_OUT) * least - ROUNDING, by_column.indices, kept.data[by_column.data], places, below
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, last row + 1) with about `TERMS` terms each, one row at least."""
        terms = np.concatenate([[0], np.cumsum(self.below, dtype=np.int64)])[self.kept.indptr]
        start, images = 0, self.kept.shape[0]
        while start < images:
            end = int(np.searchsorted(terms, terms[start] + TERMS, side="right")) - 1
            end = min(max(end, start + 1), images)
            yield start, end
            start = end

    def candidates(self, rows: tuple[int, int]) -> tuple[Integers, Integers]:
        """(i, j) of the pairs i < j that may be near, i in a range of rows."""
        kept, (start, end) = self.kept, rows
        first, last = kept.indptr[start], kept.indptr[end]
        below = self.below[first:last]
        ends = np.concatenate([[0], np.cumsum(below, dtype=np.int64)])
        places = np.repeat(self.places[first:last] + 1 - ends[:-1], below)
        places += np.arange(len(places))
        smaller = np.minimum(self.values[places], np.repeat(kept.data[first:last], below))
        terms = csr_array((smaller, self.rows[places], ends), shape=(last - first, kept.shape[1]))
        of_row = (np.ones(last - first, kept.dtype), np.arange(last - first), kept.indptr[start : end + 1] - first)
        shared = csr_array(csr_array(of_row, shape=(end - start, last - first)) @ terms)
        may = np.flatnonzero(shared.data >= self.least)
        row = np.searchsorted(shared.indptr, may, side="right") - 1 + start
        return row.astype(np.int32), shared.indices[may]


def _common_first(members: csr_array) -> csr_array:
    """[N, N]: columns in another order, those with most entries first; rows sorted by it."""
    order = np.argsort(-np.bincount(members.indices, minlength=members.shape[1]), kind="stable")
    renamed = np.empty(len(order), members.indices.dtype)
    renamed[order] = np.arange(len(order))
    found = csr_array((members.data, renamed[members.indices], members.indptr), shape=members.shape, copy=True)
    found.sort_indices()
    return found


def _distances(members: csr_array, row: Integers, column: Integers) -> Floats:
    """[pairs]: Jaccard distances of rows of sum 1; never below 0."""
    shared = np.empty(len(row), members.dtype)
    for start in range(0, len(row), PAIRS):
        here = slice(start, start + PAIRS)
        shared[here] = members[row[here]].minimum(members[column[here]]).sum(axis=1)
    return np.maximum(1 - shared / (2 - shared), 0)
