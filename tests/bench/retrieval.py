"""Scores of a retrieval, against the matrix product they need and against sorting the gallery for every query."""

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from tests.bench.measure import rates
from tests.bench.scale import Scale, full
from tests.bench.table import Table, Target, compare
from training.reid.retrieval import CHUNK_MB, evaluate, normalised

IMAGES_PER_IDENTITY, CAMERAS = 27, 15
"""As in MSMT17's gallery."""
OURS, PRODUCT, SORTED = "evaluate", "its matrix product alone", "argsort and a loop over queries"
Labels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Task:
    query: np.ndarray
    gallery: np.ndarray
    labels: Labels
    """Identities of queries and gallery, cameras of queries and gallery, as `evaluate` takes them."""


def retrieval(scale: Scale) -> Table:
    """Random features; the loop's scores must equal ours."""
    task = _task(scale)
    ours = evaluate(task.query, task.gallery, *task.labels)
    looped = min(scale.looped, scale.queries)
    distances = 2 - 2 * normalised(task.query[:looped]) @ normalised(task.gallery).T
    mine = ours.average_precision[ours.queries < looped]
    np.testing.assert_allclose(_sorted(distances, task.labels), mine, rtol=0, atol=1e-3)
    with threadpool_limits(1):  # idle BLAS threads spin, which would count as CPU time
        found = rates({
            OURS: lambda: _evaluate(task),
            PRODUCT: lambda: _product(task),
            SORTED: lambda: _loop(distances, task.labels),
        }, scale.rounds)
    whole = scale == full(scale)  # the targets are for this size
    rows = (
        compare(found, OURS, OURS, PRODUCT, Target(1 / 1.8) if whole else None),
        compare(found, OURS, OURS, SORTED, Target(8) if whole else None),
    )
    notes = (
        "targets are for MSMT17's size, 11 659 x 82 161 x 768 (--full): at most 1.8 times the time of the product, and "
        "8 times faster than the loop; here in CPU time, one BLAS thread",
        f"the loop follows the published eval_func; it scores {looped} of the queries, to the same average precision; "
        "the matrix product is counted for ours only",
    )
    about = f"{scale.queries} queries, {scale.gallery} gallery images, {scale.channels} channels, float32"
    return Table("retrieval", about, "queries/s per CPU-second", rows, notes)


def _task(scale: Scale) -> _Task:
    random = np.random.default_rng(0)
    identities = max(2, scale.gallery // IMAGES_PER_IDENTITY)
    query, gallery = (random.standard_normal((rows, scale.channels), np.float32)
                      for rows in (scale.queries, scale.gallery))
    people = [random.integers(0, identities, rows) for rows in (scale.queries, scale.gallery)]
    cameras = [random.integers(0, CAMERAS, rows) for rows in (scale.queries, scale.gallery)]
    return _Task(query, gallery, (*people, *cameras))


def _evaluate(task: _Task) -> int:
    evaluate(task.query, task.gallery, *task.labels)
    return len(task.query)


def _product(task: _Task) -> int:
    """Chunk by chunk into one buffer, as a whole it would not fit."""
    rows = max(1, int(CHUNK_MB * 1e6 / (4 * len(task.gallery))))
    buffer = np.empty((rows, len(task.gallery)), np.float32)
    for start in range(0, len(task.query), rows):
        part = task.query[start:start + rows]
        np.matmul(part, task.gallery.T, out=buffer[:len(part)])
    return len(task.query)


def _loop(distances: np.ndarray, labels: Labels) -> int:
    _sorted(distances, labels)
    return len(distances)


def _sorted(distances: np.ndarray, labels: Labels) -> list[float]:
    """Average precision of the queries that have a match, by the Market-1501 protocol as it is commonly programmed."""
    query_pids, gallery_pids, query_cameras, gallery_cameras = labels
    curves, precisions = [], []
    for row, ranking in enumerate(np.argsort(distances, axis=1)):
        same_person = gallery_pids[ranking] == query_pids[row]
        same_camera = gallery_cameras[ranking] == query_cameras[row]
        matches = same_person[~(same_person & same_camera)].astype(np.int32)
        if not matches.any():
            continue
        matched = matches.cumsum()
        curves.append(np.minimum(matched, 1)[:50])
        precision = matched / np.arange(1, len(matches) + 1) * matches
        precisions.append(float(precision.sum() / matches.sum()))
    np.mean(curves, axis=0)  # the CMC curve
    return precisions
