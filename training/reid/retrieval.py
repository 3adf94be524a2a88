"""CMC, mAP and mINP by the Market-1501 protocol, a chunk of queries at a time; no query x gallery matrix is ever held.

Equal to `eval_func` of TransReID (PASS_transreid/utils/metrics.py:28) and, for mINP, to fast-reid's `eval_market1501`
(fastreid/evaluation/rank.py:99).

Shapes: Q queries, G gallery images, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from datapipe.core.progress import QUIET_S, Progress
from training.clustering.nearest import CHUNK_MB, Chunk, Floats, Integers, distance_chunks, refuse_unfit
from training.reid.ranking import Labels, Ranking, rank
from training.reid.reranking import reranked
from training.reid.settings import RerankConfig

Ties = Literal["order", "together"]
"""Average precision where distances are equal. "order": one after the other, as they stand in the gallery
(`eval_func`); "together": at one threshold, as scikit-learn's `average_precision_score`, which unsupervised code uses
(`clustercontrast/evaluation_metrics/ranking.py` mean_ap). Without ties both are the same."""


@dataclass(frozen=True)
class RetrievalResult:
    """Scores as fractions (0..1). `queries` names the rows that had a match; the others were skipped, not scored 0."""

    cmc: NDArray[np.float64]
    """[ranks]: share of queries with a match among the first 1, 2, ... gallery images."""
    mAP: float  # noqa: N815 - the field's own spelling
    mINP: float  # noqa: N815
    queries: NDArray[np.int64]
    """[valid]: the rows of the query set that were scored, ascending."""
    average_precision: NDArray[np.float64]
    """[valid]: mean of the precision at each match."""
    trapezoid_precision: NDArray[np.float64]
    """[valid]: area under precision over recall by trapezoids, as in the official Market-1501 code; lower."""
    inverse_negative_penalty: NDArray[np.float64]
    """[valid]: matches over the place of the last one."""
    first_match: NDArray[np.int64]
    """[valid]: place of the first match, 1-based."""
    skipped: int
    """Queries whose identity no other camera of the gallery has seen."""
    nearest: NDArray[np.int64]
    """[Q, top_k]: gallery rows in ranked order, same-camera images and junk left out; -1 where there are no more."""
    nearest_distances: Floats
    """[Q, top_k]: their distances; infinite where there are no more. Squared Euclidean between unit features (0..4), or
    those that were given, or re-ranked ones (0..1)."""
    matching: Floats
    """Distances of pairs of one person and two cameras: an even sample, at most `ranking.SAMPLED` of each query."""
    others: Floats
    """Distances of pairs of two people, likewise."""

    @property
    def trapezoid_mAP(self) -> float:  # noqa: N802
        """The mAP of the official Market-1501 code; tables of the literature have the other one."""
        return float(self.trapezoid_precision.mean())


def evaluate(
    query_features: Floats,
    gallery_features: Floats,
    q_pids: Integers,
    g_pids: Integers,
    q_cams: Integers,
    g_cams: Integers,
    *,
    reranking: RerankConfig | None = None,
    normalise: bool = True,
    ties: Ties = "order",
    ranks: int = 50,
    top_k: int = 0,
    chunk_mb: float = CHUNK_MB,
    threads: int = 2,
    label: str = "rank",
) -> RetrievalResult:
    """Rank the gallery for every query by the squared Euclidean distance of the features [Q, C] and [G, C], divided by
    their length unless `normalise` is False.

    Gallery images of the query's identity and camera, and junk (pid -1), are left out. Equal distances keep the order
    of the gallery. `top_k` asks for the first places of every ranking, taken from the very numbers that are scored.
    `ties`: see `Ties`. With `reranking` the k-reciprocal distances of the normalised features decide instead. `label`:
    what its progress is called.
    Errors: `DataError` for features that are not finite or do not fit, and when no query has a match.
    """
    labels = Labels(np.asarray(q_pids), np.asarray(g_pids), np.asarray(q_cams), np.asarray(g_cams))
    features = _stacked(query_features, gallery_features, labels, normalise=normalise or reranking is not None)
    queries = len(labels.query_pids)
    if reranking is not None:
        chunks = reranked(features, queries, reranking, chunk_mb=chunk_mb, threads=threads, label=label)
        offset = 0.0
    elif normalise:
        chunks, offset = distance_chunks(features[:queries], features[queries:], chunk_mb), 2.0
    else:
        chunks, offset = _whole_distances(features, queries, chunk_mb), 0.0
    with Progress(label, queries, unit="queries", quiet_s=QUIET_S) as progress:
        followed = progress.over(chunks, lambda chunk: len(chunk[1]))
        rankings = rank(followed, labels, top_k=top_k, threads=threads, tied=ties == "together")
        return _summary(rankings, ranks, offset=offset)


def evaluate_distances(
    distances: Floats,
    q_pids: Integers,
    g_pids: Integers,
    q_cams: Integers,
    g_cams: Integers,
    *,
    ties: Ties = "order",
    ranks: int = 50,
    top_k: int = 0,
    threads: int = 2,
) -> RetrievalResult:
    """Score distances [Q, G] that were computed elsewhere, such as another model's; any dtype, smaller is nearer. For
    use from Python: no command needs it.

    Raises DataError for another shape and for NaN.
    """
    labels = Labels(np.asarray(q_pids), np.asarray(g_pids), np.asarray(q_cams), np.asarray(g_cams))
    expected = (len(labels.query_pids), len(labels.gallery_pids))
    if distances.shape != expected:
        raise DataError(f"distances of shape {distances.shape} for {expected[0]} queries and {expected[1]} images")
    if np.isnan(distances).any():
        raise DataError("distances contain NaN")
    rows = max(1, int(CHUNK_MB * 1e6 / max(1, distances[:1].nbytes)))
    chunks = ((start, distances[start : start + rows].copy()) for start in range(0, len(distances), rows))
    return _summary(rank(chunks, labels, top_k=top_k, threads=threads, tied=ties == "together"), ranks)


def per_camera(result: RetrievalResult, query_cameras: Integers) -> dict[int, float]:
    """mAP of the scored queries of each camera (as numbered in `query_cameras`), cameras ascending."""
    cameras = np.asarray(query_cameras)[result.queries]
    return {int(camera): float(result.average_precision[cameras == camera].mean()) for camera in np.unique(cameras)}


def confident_mistakes(result: RetrievalResult, count: int) -> NDArray[np.int64]:
    """Scored queries whose nearest image shows somebody else, the nearest such image first: positions in
    `result.queries`. Wants `top_k` of at least 1."""
    wrong = np.flatnonzero(result.first_match > 1)
    distances = result.nearest_distances[result.queries[wrong], 0]
    return wrong[np.argsort(distances, kind="stable")][:count]


def _whole_distances(features: Floats, queries: int, chunk_mb: float) -> Iterator[Chunk]:
    """Squared Euclidean distances of the first rows, the queries, to the others, as they are."""
    squares = np.einsum("nc,nc->n", features, features)
    for start, block in distance_chunks(features[:queries], features[queries:], chunk_mb):
        block += squares[queries:]
        block += squares[start : start + len(block), None]
        yield start, block


def _stacked(query: Floats, gallery: Floats, labels: Labels, *, normalise: bool) -> Floats:
    """[Q + G, C]: the rows of both, maybe divided by their L2 norm; what is lower than float32 is raised to it."""
    for part, features, pids in (("query", query, labels.query_pids), ("gallery", gallery, labels.gallery_pids)):
        refuse_unfit(features, f"{part} features")
        if len(features) != len(pids):
            raise DataError(f"{part}: {len(features)} features for {len(pids)} labels")
    if query.shape[1] != gallery.shape[1]:
        raise DataError(f"query features have {query.shape[1]} channels, gallery features {gallery.shape[1]}")
    dtype = np.result_type(query, gallery, np.float32)
    features = np.empty((len(query) + len(gallery), query.shape[1]), dtype)
    features[: len(query)], features[len(query) :] = query, gallery
    if not normalise:
        return features
    norms = np.sqrt(np.einsum("nc,nc->n", features, features))
    features /= np.maximum(norms, np.finfo(dtype).tiny)[:, None]  # a row of zeros stays one
    return features


def _summary(rankings: list[Ranking], ranks: int, *, offset: float = 0.0) -> RetrievalResult:
    """`offset` is added to the distances that are reported."""
    queries = np.array([row for row, one in enumerate(rankings) if len(one.places)], np.int64)
    if not len(queries):
        raise DataError(
            f"none of the {len(rankings)} queries has an image of its identity from another camera in the gallery",
            hint="check the identity and camera numbers in the file names",
        )
    places = [rankings[row].places for row in queries]
    precision, trapezoid = (np.array([mean(at) for at in places]) for mean in (_precision, _trapezoid))
    through = [rankings[row].through for row in queries]
    if any(at is not None for at in through):
        precision = np.array([_tied_precision(at) for at in through if at is not None])
    penalty = np.array([len(at) / at[-1] for at in places])
    first = np.array([at[0] for at in places], np.int64)
    return RetrievalResult(
        cmc=(first[:, None] <= np.arange(1, ranks + 1)).mean(axis=0),
        mAP=float(precision.mean()),
        mINP=float(penalty.mean()),
        queries=queries,
        average_precision=precision,
        trapezoid_precision=trapezoid,
        inverse_negative_penalty=penalty,
        first_match=first,
        skipped=len(rankings) - len(queries),
        nearest=np.stack([one.nearest for one in rankings]),
        nearest_distances=np.stack([one.nearest_distances for one in rankings]) + offset,
        matching=np.concatenate([one.matching for one in rankings]) + offset,
        others=np.concatenate([one.others for one in rankings]) + offset,
    )


def _precision(places: NDArray[np.int64]) -> float:
    """Mean of the precision at each match."""
    return float(np.mean(np.arange(1, len(places) + 1) / places))


def _tied_precision(through: NDArray[np.int64]) -> float:
    """Mean over the matches of the precision among all images that are as near as the match or nearer."""
    matches = np.searchsorted(through, through, side="right")
    return float(np.mean(matches / through))


def _trapezoid(places: NDArray[np.int64]) -> float:
    """Mean over the matches of the precision at the match and just before it; that before the first image is 1."""
    matches = np.arange(1, len(places) + 1)
    before = np.where(places > 1, (matches - 1) / np.maximum(places - 1, 1), 1.0)
    return float(np.mean((matches / places + before) / 2))
