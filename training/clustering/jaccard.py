"""Jaccard distance of k-reciprocal neighbourhoods, for the pairs of images that are near to each other alone.

Equal to `compute_jaccard_distance` of cluster-contrast (clustercontrast/utils/faiss_rerank.py:30), which PASS and
TransReID-SSL use as it is, in memory that grows with the number of images instead of its square.

With memberships V, whose rows have the sum 1, the distance is d = 1 - m / (2 - m) with m(i, j) = sum_c min(V_ic, V_jc).
It is 1 where the supports of two rows do not meet, and a row has a hundred entries or so. For many rows i at a time,
the entries that follow each of theirs in its column are looked up, cut to its size, and added up by pair in a sparse
product; no step of Python is taken per row. N images, C channels.
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
    columns = _Columns.of(members)
    parts: list[tuple[Integers, Integers, Floats]] = []
    images, found = members.shape[0], 0

    def work(rows: tuple[int, int]) -> tuple[int, tuple[Integers, Integers, Floats]]:
        return rows[1] - rows[0], _near(columns, rows, eps)

    with Progress(label, images, unit="images", quiet_s=QUIET_S) as progress:
        for _, part in progress.over(in_order(work, columns.blocks(), threads=threads), lambda done: done[0]):
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
class _Columns:
    """Memberships by row and by column at once; "place": that of an entry when they are listed column by column."""

    members: csr_array
    """[N, N]"""
    rows: Integers
    """[entries]: row of the entry at each place; ascending within a column."""
    values: Floats
    """[entries]: the entry at each place."""
    places: Integers
    """[entries]: place of each entry of `members`."""
    below: Integers
    """[entries]: how many entries of its column follow each entry of `members`."""

    @staticmethod
    def of(members: csr_array) -> "_Columns":
        entries = np.arange(members.nnz, dtype=members.indptr.dtype)
        by_column = csr_array((entries, members.indices, members.indptr), shape=members.shape).tocsc()
        places = np.empty_like(entries)
        places[by_column.data] = entries
        below = by_column.indptr[members.indices + 1] - places - 1
        return _Columns(members, by_column.indices, members.data[by_column.data], places, below)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, last row + 1) with about `TERMS` terms each, one row at least."""
        terms = np.concatenate([[0], np.cumsum(self.below, dtype=np.int64)])[self.members.indptr]
        start, images = 0, self.members.shape[0]
        while start < images:
            end = int(np.searchsorted(terms, terms[start] + TERMS, side="right")) - 1
            end = min(max(end, start + 1), images)
            yield start, end
            start = end


def _near(columns: _Columns, rows: tuple[int, int], eps: float) -> tuple[Integers, Integers, Floats]:
    """(i, j, distance) of the pairs i < j that are at most `eps` apart, i in a range of rows."""
    members, (start, end) = columns.members, rows
    first, last = members.indptr[start], members.indptr[end]
    below = columns.below[first:last]
    ends = np.concatenate([[0], np.cumsum(below, dtype=np.int64)])
    places = np.repeat(columns.places[first:last] + 1 - ends[:-1], below)
    places += np.arange(len(places))
    smaller = np.minimum(columns.values[places], np.repeat(members.data[first:last], below))
    terms = csr_array((smaller, columns.rows[places], ends), shape=(last - first, members.shape[1]))
    ones = np.ones(last - first, members.dtype)
    of_row = (ones, np.arange(last - first), members.indptr[start : end + 1] - first)
    shared = csr_array(csr_array(of_row, shape=(end - start, last - first)) @ terms)
    distances = np.maximum(1 - shared.data / (2 - shared.data), 0)
    near = np.flatnonzero(distances <= eps)
    row = np.repeat(np.arange(start, end, dtype=np.int32), np.diff(shared.indptr))
    return row[near], shared.indices[near], distances[near]
