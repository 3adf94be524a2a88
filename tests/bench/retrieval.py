"""Scores of a retrieval, against the matrix product they need and against sorting the gallery for every query."""

from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np
from threadpoolctl import threadpool_limits

from tests.bench.measure import Rates, Spread, Work, peak_mb, rates
from tests.bench.scale import Scale, full
from tests.bench.table import Row, Table, Target, compare
from training.clustering.nearest import CHUNK_MB, distance_chunks
from training.reid.retrieval import evaluate, evaluate_distances
from training.reid.settings import RerankConfig

IMAGES_PER_IDENTITY, CAMERAS = 27, 15
"""As in MSMT17's gallery."""
NOISE = 1.5
"""Of an identity's images about its centre, for re-ranking: neighbourhoods of random features would be empty."""
OURS, PRODUCT, SORTED = "evaluate", "its matrix product alone", "the product, argsort and a loop over queries"
RANKED, LOOP = "ranking given distances", "argsort and a loop over queries"
Labels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Task:
    query: np.ndarray
    """[Q, C], rows of length 1."""
    gallery: np.ndarray
    labels: Labels
    """Identities of queries and gallery, cameras of queries and gallery, as `evaluate` takes them."""

    def first(self, queries: int) -> "_Task":
        """The same for so many queries."""
        query_pids, gallery_pids, query_cameras, gallery_cameras = self.labels
        labels = (query_pids[:queries], gallery_pids, query_cameras[:queries], gallery_cameras)
        return _Task(self.query[:queries], self.gallery, labels)


def retrieval(scale: Scale) -> Table:
    """Random features; the loop's scores must equal ours."""
    task = _task(scale, noise=np.inf)
    ours = evaluate(task.query, task.gallery, *task.labels)
    memory_mb = peak_mb()
    few = task.first(min(scale.looped, scale.queries))
    distances = -few.query @ few.gallery.T
    mine = ours.average_precision[ours.queries < len(few.query)]
    np.testing.assert_allclose(_sorted(distances, few.labels), mine, rtol=0, atol=1e-3)
    with threadpool_limits(1):  # idle BLAS threads spin, which would count as CPU time
        cpu = rates(
            {
                OURS: lambda: _evaluate(task),
                PRODUCT: lambda: _product(task),
                RANKED: lambda: len(evaluate_distances(distances, *few.labels).nearest),
                LOOP: lambda: _sort(distances, few.labels),
            },
            scale.rounds,
        )
    works: dict[str, Work] = {OURS: lambda: _evaluate(task), SORTED: lambda: _loop(few)}
    wall = rates(works, scale.rounds, dict.fromkeys(works, perf_counter))
    rows = (*_compared(cpu, wall, whole=scale == full(scale)), *_sizes(memory_mb, scale))
    notes = (
        "targets are for MSMT17's size, 11 659 x 82 161 x 768 (--full): at most 1.8 times the time of the product, 8 "
        "times faster than the loop, below 2 GB in all",
        f"the loop follows the published eval_func in numpy; it scores {len(few.query)} of the queries, to the same "
        "average precision",
        "CPU time: one BLAS thread; wall clock: all cores, of which argsort and the loop use one",
        "memory: the most that the process ever held, interpreter and libraries included",
        "re-ranking: once, k1 = 20, k2 = 6; features scatter about their identities, 27 images of each",
    )
    about = f"{scale.queries} queries, {scale.gallery} gallery images, {scale.channels} channels, float32"
    return Table("retrieval", about, "queries/s, or as the row says", rows, notes)


def _compared(cpu: Rates, wall: Rates, *, whole: bool) -> list[Row]:
    product, loop = (Target(1 / 1.8), Target(8)) if whole else (None, None)
    return [
        compare(cpu, f"{OURS}, CPU time", OURS, PRODUCT, product),
        compare(cpu, f"{RANKED}, CPU time", RANKED, LOOP, loop),
        compare(wall, f"{OURS}, wall clock", OURS, SORTED, loop),
    ]


def _sizes(memory_mb: float, scale: Scale) -> list[Row]:
    """Memory of ranking alone; then time and memory with re-ranking."""
    task = _task(scale, noise=NOISE)
    wall, cpu = perf_counter(), process_time()
    evaluate(task.query, task.gallery, *task.labels, top_k=10, reranking=RerankConfig())
    figures = {"re-ranking, s": perf_counter() - wall, "re-ranking, CPU s": process_time() - cpu,
               "memory with re-ranking, MB": peak_mb()}  # fmt: skip
    memory = Row("memory, MB", Spread.of([memory_mb]), target=Target(2_000, at_least=False))
    return [memory, *(Row(what, Spread.of([figure])) for what, figure in figures.items())]


def _task(scale: Scale, *, noise: float) -> _Task:
    """`noise` in units of the distance between identities; infinite: features know no identities."""
    random = np.random.default_rng(0)
    identities = max(2, scale.gallery // IMAGES_PER_IDENTITY)
    sizes = (scale.queries, scale.gallery)
    people = [random.integers(0, identities, rows) for rows in sizes]
    cameras = [random.integers(0, CAMERAS, rows) for rows in sizes]
    centres = random.standard_normal((identities, scale.channels), np.float32)
    features = [random.standard_normal((rows, scale.channels), np.float32) for rows in sizes]
    for part, pids in zip(features, people, strict=True):
        if noise < np.inf:
            part *= noise
            part += centres[pids]
        part /= np.sqrt(np.einsum("nc,nc->n", part, part))[:, None]
    return _Task(*features, (*people, *cameras))


def _evaluate(task: _Task) -> int:
    evaluate(task.query, task.gallery, *task.labels)
    return len(task.query)


def _product(task: _Task) -> int:
    """Chunk by chunk into one buffer: as a whole it would not fit."""
    return sum(len(chunk) for _, chunk in distance_chunks(task.query, task.gallery, CHUNK_MB))


def _loop(task: _Task) -> int:
    _sorted(-task.query @ task.gallery.T, task.labels)
    return len(task.query)


def _sort(distances: np.ndarray, labels: Labels) -> int:
    _sorted(distances, labels)
    return len(distances)


def _sorted(distances: np.ndarray, labels: Labels) -> list[float]:
    """Average precision of the queries that have a match, by the Market-1501 protocol as it is commonly programmed."""
    query_pids, gallery_pids, query_cameras, gallery_cameras = labels
    rankings = np.argsort(distances, axis=1)
    matches = (gallery_pids[rankings] == query_pids[:, None]).astype(np.int32)
    curves, precisions = [], []
    for row, ranking in enumerate(rankings):
        junk = (gallery_pids[ranking] == query_pids[row]) & (gallery_cameras[ranking] == query_cameras[row])
        matched = matches[row][~junk]
        if not matched.any():
            continue
        found = matched.cumsum()
        curve = found.copy()
        curve[curve > 1] = 1
        curves.append(curve[:50])
        precision = found / np.arange(1.0, len(matched) + 1) * matched
        precisions.append(float(precision.sum() / matched.sum()))
    np.mean(curves, axis=0)  # the CMC curve
    return precisions
