"""CMC, mAP and mINP by the Market-1501 protocol, a chunk of queries at a time.

No query x gallery matrix is ever held, and nothing is sorted: the place of a positive in the ranking is one more than
the number of gallery images that are nearer. Equal to `eval_func` of TransReID (PASS_transreid/utils/metrics.py:28)
and, for mINP, to fast-reid's `eval_market1501` (fastreid/evaluation/rank.py:99).

Shapes: Q queries, G gallery images, C channels.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import DataError

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

CHUNK_MB = 64.0
"""Distances held at once, in megabytes (10^6 bytes)."""


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
    """[valid]: mean of the precision at each match (not the trapezoid of the official Market-1501 code)."""
    inverse_negative_penalty: NDArray[np.float64]
    """[valid]: matches over the place of the last one."""
    first_match: NDArray[np.int64]
    """[valid]: place of the first match, 1-based."""
    skipped: int
    """Queries whose identity no other camera of the gallery has seen."""
    nearest: NDArray[np.int64]
    """[Q, keep]: gallery rows in ranked order, same-camera images and junk left out; -1 where there are no more."""


@dataclass(frozen=True)
class _Labels:
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
class _Ranked:
    places: NDArray[np.int64]  # [positives], 1-based, ascending
    nearest: NDArray[np.int64]  # [keep]


def evaluate(
    query_features: Floats,
    gallery_features: Floats,
    q_pids: Integers,
    g_pids: Integers,
    q_cams: Integers,
    g_cams: Integers,
    *,
    ranks: int = 50,
    keep: int = 0,
    chunk_mb: float = CHUNK_MB,
    threads: int = 2,
) -> RetrievalResult:
    """Rank the gallery for every query by the cosine of the features [Q, C] and [G, C].

    The order is that of the squared Euclidean distance between L2-normalised features. Gallery images of the query's
    identity and camera, and junk (pid -1), are left out. Equal distances keep the order of the gallery. `keep` asks
    for the first places of every ranking, taken from the very numbers that are scored.
    Errors: `DataError` for features that are not finite or do not fit, and when no query has a match.
    """
    labels = _Labels(np.asarray(q_pids), np.asarray(g_pids), np.asarray(q_cams), np.asarray(g_cams))
    query, gallery = normalised(query_features, "query"), normalised(gallery_features, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise DataError(f"query features have {query.shape[1]} channels, gallery features {gallery.shape[1]}")
    for part, features, pids in (("query", query, labels.query_pids), ("gallery", gallery, labels.gallery_pids)):
        if len(features) != len(pids):
            raise DataError(f"{part}: {len(features)} features for {len(pids)} labels")
    return _evaluate(_cosine_chunks(query, gallery, chunk_mb), labels, ranks=ranks, keep=keep, threads=threads)


def evaluate_distances(
    distances: Floats,
    q_pids: Integers,
    g_pids: Integers,
    q_cams: Integers,
    g_cams: Integers,
    *,
    ranks: int = 50,
    keep: int = 0,
    threads: int = 2,
) -> RetrievalResult:
    """The same for distances [Q, G] that somebody else has computed; any dtype, smaller is nearer."""
    labels = _Labels(np.asarray(q_pids), np.asarray(g_pids), np.asarray(q_cams), np.asarray(g_cams))
    expected = (len(labels.query_pids), len(labels.gallery_pids))
    if distances.shape != expected:
        raise DataError(f"distances of shape {distances.shape} for {expected[0]} queries and {expected[1]} images")
    if np.isnan(distances).any():
        raise DataError("distances contain NaN")
    chunks = ((row, distances[row : row + 1].copy()) for row in range(len(distances)))
    return _evaluate(chunks, labels, ranks=ranks, keep=keep, threads=threads)


def normalised(features: Floats, part: str = "these") -> Floats:
    """Rows divided by their L2 norm; what is lower than float32 is raised to it. A row of zeros stays one."""
    if features.ndim != 2:
        raise DataError(f"{part} features have shape {features.shape}; expected (images, channels)")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(features)} {part} features are not finite (the first: row {bad[0]})",
            hint="the weights may be broken, or the precision too low: evaluate in fp32",
        )
    values = features.astype(np.promote_types(features.dtype, np.float32), copy=False)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(norms, np.finfo(values.dtype).tiny)


def _cosine_chunks(query: Floats, gallery: Floats, chunk_mb: float) -> Iterator[tuple[int, Floats]]:
    """(first row, negative cosines [rows, G]); one buffer, overwritten by the next chunk."""
    rows = max(1, min(len(query), int(chunk_mb * 1e6 / max(1, gallery.itemsize * len(gallery)))))
    buffer = np.empty((rows, len(gallery)), np.result_type(query, gallery))
    for start in range(0, len(query), rows):
        part = query[start : start + rows]
        yield start, np.matmul(-part, gallery.T, out=buffer[: len(part)])


def _evaluate(
    chunks: Iterable[tuple[int, Floats]], labels: _Labels, *, ranks: int, keep: int, threads: int
) -> RetrievalResult:
    by_pid = _ByIdentity(labels.gallery_pids)
    junk = np.flatnonzero(labels.gallery_pids == -1)

    def rank(query: int, row: Floats) -> _Ranked:
        same = by_pid.rows(labels.query_pids[query])
        other_camera = labels.gallery_cameras[same] != labels.query_cameras[query]
        row[same[~other_camera]] = np.inf
        row[junk] = np.inf
        positives = same[other_camera] if labels.query_pids[query] != -1 else same[:0]
        return _Ranked(np.sort(_places(row, positives)), _nearest(row, keep))

    ranked: list[_Ranked] = []
    with ThreadPoolExecutor(max_workers=threads) as pool:  # numpy compares and counts without the interpreter's lock
        for start, block in chunks:
            ranked.extend(pool.map(rank, range(start, start + len(block)), block))
    return _summary(ranked, ranks, keep)


def _places(row: Floats, positives: Integers) -> NDArray[np.int64]:
    """1-based place of each positive in the stable ranking: the nearer ones, and the equally near ones before it."""
    nearer = [np.count_nonzero(row[:at] <= row[at]) + np.count_nonzero(row[at + 1 :] < row[at]) for at in positives]
    return np.array(nearer, np.int64) + 1


def _nearest(row: Floats, keep: int) -> NDArray[np.int64]:
    first = np.full(keep, -1, np.int64)
    if keep == 0:
        return first
    border = np.partition(row, keep - 1)[keep - 1] if keep < len(row) else np.inf
    candidates = np.flatnonzero((row <= border) & (row < np.inf))
    best = candidates[np.argsort(row[candidates], kind="stable")][:keep]
    first[: len(best)] = best
    return first


def _summary(ranked: list[_Ranked], ranks: int, keep: int) -> RetrievalResult:
    queries = np.array([row for row, one in enumerate(ranked) if len(one.places)], np.int64)
    if not len(queries):
        raise DataError(
            f"none of the {len(ranked)} queries has an image of its identity from another camera in the gallery",
            hint="check the identity and camera numbers in the file names",
        )
    places = [ranked[row].places for row in queries]
    precision = np.array([np.mean(np.arange(1, len(at) + 1) / at) for at in places])
    penalty = np.array([len(at) / at[-1] for at in places])
    first = np.array([at[0] for at in places], np.int64)
    return RetrievalResult(
        cmc=(first[:, None] <= np.arange(1, ranks + 1)).mean(axis=0),
        mAP=float(precision.mean()),
        mINP=float(penalty.mean()),
        queries=queries,
        average_precision=precision,
        inverse_negative_penalty=penalty,
        first_match=first,
        skipped=len(ranked) - len(queries),
        nearest=np.stack([one.nearest for one in ranked]) if keep else np.empty((len(ranked), 0), np.int64),
    )


class _ByIdentity:
    """Gallery rows of an identity, ascending, without a search through the gallery."""

    def __init__(self, pids: Integers) -> None:
        self._order = np.argsort(pids, kind="stable")
        self._sorted = pids[self._order]

    def rows(self, pid: np.integer) -> NDArray[np.int64]:
        start, end = np.searchsorted(self._sorted, [pid, pid + 1])
        return self._order[start:end]
