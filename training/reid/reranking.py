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
from scipy.sparse import csc_array, csr_array

from datapipe.core.progress import QUIET_S, Progress
from training.clustering.k_reciprocal import memberships
from training.clustering.nearest import Chunk, Floats, Integers, distance_chunks, in_slices, nearest
from training.reid.settings import RerankConfig


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
    found = neighbours(features, config.k1, chunk_mb=chunk_mb, threads=threads, label=f"{label}, neighbours")
    members = memberships(
        features, found.nearest, k1=config.k1, k2=config.k2, scale=found.furthest, threads=threads,
        label=f"{label}, neighbourhoods",
    )  # fmt: skip
    of_queries, of_gallery = members[:queries], members[queries:].tocsc()
    del members
    return _distances(features, queries, config, found.furthest, of_queries, of_gallery, chunk_mb)


def _distances(
    features: Floats, queries: int, config: RerankConfig, furthest: Floats, of_queries: csr_array,
    of_gallery: csc_array, chunk_mb: float,
) -> Iterator[Chunk]:  # fmt: skip
    for start, distances in distance_chunks(features[:queries], features[queries:], chunk_mb):
        distances += 2
        distances *= config.weight / furthest[start : start + len(distances), None]
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


def _jaccard(of_queries: csr_array, query: int, of_gallery: csc_array) -> Floats:
    """[G]: Jaccard distance of a query's neighbourhood to those of the gallery: shared over united membership."""
    here = slice(of_queries.indptr[query], of_queries.indptr[query + 1])
    columns = of_gallery[:, of_queries.indices[here]]
    smaller = np.minimum(columns.data, np.repeat(of_queries.data[here], np.diff(columns.indptr)))
    shared = np.bincount(columns.indices, smaller, columns.shape[0]).astype(of_gallery.dtype)
    return 1 - shared / (2 - shared)
