"""Re-ranking by k-reciprocal encoding (Zhong et al., CVPR 2017) in bounded memory.

Equal to `re_ranking` of the reference (PASS_transreid/utils/reranking.py:29) with its intermediate results in float32:
it keeps membership weights and Jaccard distances in float16, which moves distances by up to 2.4e-3 and mAP by up to
1.3e-3. Here no image x image matrix is held: the nearest neighbours come from products a few rows at a time, and
memberships are sparse.

Shapes: N images, queries first; Q queries, G gallery images, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

from datapipe.core.progress import QUIET_S, Progress
from training.reid.ranking import Chunk, Floats, Integers, distance_chunks, in_slices, nearest
from training.reid.settings import RerankConfig

ROWS = 128
"""Images whose neighbourhoods are worked out at once."""


@dataclass(frozen=True)
class Neighbours:
    """What the products of all images with all images leave behind."""

    nearest: Integers
    """[N, k1 + 1]: nearest first; the image itself among them."""
    furthest: Floats
    """[N]: the largest squared distance from the image to any, by which the reference divides."""


def reranked(
    features: Floats, queries: int, config: RerankConfig, *, chunk_mb: float, threads: int, label: str = "re-rank"
) -> Iterator[Chunk]:
    """Re-ranked distances (0..1) of every query to the gallery, a few queries at a time; unit rows [N, C]. What they
    take is worked out at once. `label`: what its progress is called."""
    nearest = neighbours(features, config.k1, chunk_mb=chunk_mb, threads=threads, label=f"{label}, neighbours")
    members = memberships(features, nearest, config, label=f"{label}, neighbourhoods")
    of_queries, of_gallery = members[:queries], members[queries:].tocsc()
    del members
    return _distances(features, queries, config, nearest, of_queries, of_gallery, chunk_mb)


def _distances(
    features: Floats, queries: int, config: RerankConfig, nearest: Neighbours, of_queries: csr_array,
    of_gallery: csc_array, chunk_mb: float,
) -> Iterator[Chunk]:  # fmt: skip
    for start, distances in distance_chunks(features[:queries], features[queries:], chunk_mb):
        distances += 2
        distances *= config.weight / nearest.furthest[start : start + len(distances), None]
        for query, row in enumerate(distances, start=start):
            row += (1 - config.weight) * _jaccard(of_queries, query, of_gallery)
        yield start, distances


def neighbours(features: Floats, k1: int, *, chunk_mb: float, threads: int, label: str = "neighbours") -> Neighbours:
    """Find the nearest neighbours of every image among all."""
    top_k = min(k1 + 1, len(features))

    def look(_: int, rows: Floats) -> list[tuple[Integers, np.floating]]:
        return [(nearest(row, top_k).astype(np.int32), row.max() + 2) for row in rows]

    with Progress(label, len(features), unit="images", quiet_s=QUIET_S) as progress:
        chunks = progress.over(distance_chunks(features, features, chunk_mb), lambda chunk: len(chunk[1]))
        parts = list(in_slices(chunks, look, threads))
    return Neighbours(np.stack([first for first, _ in parts]), np.array([far for _, far in parts], features.dtype))


def memberships(
    features: Floats, nearest: Neighbours, config: RerankConfig, *, label: str = "neighbourhoods"
) -> csr_array:
    """[N, N], sparse, rows of sum 1: how much each image belongs to the neighbourhood of each row's image."""
    half = nearest.nearest[:, : int(np.around(config.k1 / 2)) + 1]
    mutual, mutual_half = _mutual(nearest.nearest), _mutual(half)
    groups = [np.arange(start, min(start + ROWS, len(features))) for start in range(0, len(features), ROWS)]
    with Progress(label, len(features), unit="images", quiet_s=QUIET_S) as progress:
        parts = [_encoded(features, nearest, rows, half, mutual, mutual_half) for rows in progress.over(groups, len)]
    counts, columns, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = (len(features), len(features))
    encoded = csr_array((weights, columns, np.concatenate([[0], np.cumsum(counts)])), shape=shape)
    if config.k2 == 1:
        return encoded
    first = nearest.nearest[:, : config.k2]
    starts = np.arange(0, first.size + 1, first.shape[1])
    mean = csr_array((np.full(first.size, 1 / first.shape[1], features.dtype), first.ravel(), starts), shape=shape)
    return csr_array(mean @ encoded)


def _mutual(nearest_rows: Integers) -> NDArray[np.bool_]:
    """[N, k]: whether the image is among the k nearest of its neighbour as well."""
    is_mutual = np.empty(nearest_rows.shape, bool)
    for start in range(0, len(is_mutual), ROWS):
        rows = np.arange(start, min(start + ROWS, len(is_mutual)))
        is_mutual[rows] = (nearest_rows[nearest_rows[rows]] == rows[:, None, None]).any(axis=2)
    return is_mutual


def _encoded(
    features: Floats,
    nearest: Neighbours,
    rows: Integers,
    half: Integers,
    mutual: NDArray[np.bool_],
    mutual_half: NDArray[np.bool_],
) -> tuple[Integers, Integers, Floats]:
    """(entries of each row, their columns, their weights): the image's mutual neighbours, and those of each of them
    that shares more than two thirds of its own with the image; weighted by exp(-distance).
    """
    near, is_mutual = nearest.nearest[rows], mutual[rows]
    further = half[near]  # [rows, k1 + 1, k1 / 2 + 1]
    is_further = mutual_half[near] & is_mutual[:, :, None]
    own = np.where(is_mutual, near, -1)
    shared = (further[..., None] == own[:, None, None, :]).any(axis=3) & is_further
    is_further &= (shared.sum(axis=2) > 2 / 3 * is_further.sum(axis=2))[:, :, None]
    first, _ = np.nonzero(is_mutual)
    second, _, _ = np.nonzero(is_further)
    row = np.concatenate([first, second])
    column = np.concatenate([near[is_mutual], further[is_further]]).astype(np.int64)
    row, column = np.divmod(np.unique(row * len(features) + column), len(features))
    cosines = np.einsum("nc,nc->n", features[rows[row]], features[column])
    weights = np.exp((2 * cosines - 2) / nearest.furthest[rows[row]])
    sums = np.bincount(row, weights, len(rows)).astype(features.dtype)
    return np.bincount(row, minlength=len(rows)), column.astype(np.int32), weights / sums[row]


def _jaccard(of_queries: csr_array, query: int, of_gallery: csc_array) -> Floats:
    """[G]: Jaccard distance of a query's neighbourhood to those of the gallery: shared over united membership."""
    here = slice(of_queries.indptr[query], of_queries.indptr[query + 1])
    columns = of_gallery[:, of_queries.indices[here]]
    smaller = np.minimum(columns.data, np.repeat(of_queries.data[here], np.diff(columns.indptr)))
    shared = np.bincount(columns.indices, smaller, columns.shape[0]).astype(of_gallery.dtype)
    return 1 - shared / (2 - shared)
