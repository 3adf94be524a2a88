"""Pseudo identities from features, against matrices of all images and loops over them, as they are commonly made."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from threadpoolctl import threadpool_limits

from tests.bench.measure import Spread, Work, held_mb, peak_mb, rates
from tests.bench.scale import Scale, full
from tests.bench.table import Row, Table, Target, compare
from training.clustering.dbscan import cluster, cluster_graph
from training.clustering.jaccard import MOST_NEAR, near_pairs
from training.clustering.k_reciprocal import memberships
from training.clustering.nearest import nearest_neighbours
from training.clustering.settings import ClusteringConfig

IMAGES_PER_IDENTITY = 31
"""As in MSMT17's training set: 32 621 images of 1 041 people."""
NOISE = 2.75
"""Of an identity's images about its centre: a few of a hundred become outliers with 768 channels."""
OURS, LOOP = "distances and DBSCAN, neighbours given", "matrices and loops, neighbours given"
WHOLE, WHOLE_LOOP = "cluster", "the search, then matrices and loops"
CONFIG = ClusteringConfig()


@dataclass(frozen=True)
class _Task:
    features: NDArray[np.float32]
    """[N, C], rows of length 1."""
    nearest: NDArray[np.int32]
    """[N, k1]"""


def clustering(scale: Scale) -> Table:
    """Random features about centres; the loop's labels must equal ours."""
    memory_mb, wall_s = _sizes(scale)
    features = _features(scale.clustered_looped, scale.channels)
    task = _Task(features, nearest_neighbours(features, CONFIG.k1))
    np.testing.assert_array_equal(_ours(task), _loop(task))
    with threadpool_limits(1):  # idle BLAS threads spin, which would count as CPU time
        cpu = rates({OURS: lambda: len(_ours(task)), LOOP: lambda: len(_loop(task))}, scale.rounds)
    works: dict[str, Work] = {WHOLE: lambda: len(cluster(features, CONFIG)), WHOLE_LOOP: lambda: _searched(features)}
    wall = rates(works, scale.rounds, dict.fromkeys(works, perf_counter))
    ratio, most_mb = (Target(10), Target(1_000, at_least=False)) if scale == full(scale) else (None, None)
    rows = (
        compare(cpu, f"{OURS}, CPU time", OURS, LOOP, ratio),
        compare(wall, f"{WHOLE}, wall clock", WHOLE, WHOLE_LOOP),
        Row(f"memory above the features, MB, {scale.clustered} images", Spread.of([memory_mb]), target=most_mb),
        Row(f"{WHOLE}, s, {scale.clustered} images", Spread.of([wall_s])),
    )  # fmt: skip
    notes = (
        "targets are for MSMT17's training set, 32 621 x 768 (--full): 10 times faster than the loop after the search, "
        "less than 1 GB above the features",
        f"the loop has the structure of the published compute_jaccard_distance: for {scale.clustered_looped} images "
        "three matrices, sets of neighbours and sums row by row in numpy; to the same labels",
        "the search is the same on both sides; CPU time: one BLAS thread; wall clock: all cores, the loop uses one",
        "memory: the most that the process held while it clustered, less what it held before",
    )
    about = f"{scale.clustered_looped} images, {scale.channels} channels, float32; k1 = 30, k2 = 6, eps = .6"
    return Table("clustering", about, "images/s, or as the row says", rows, notes)


def _sizes(scale: Scale) -> tuple[float, float]:
    """(memory above the features in MB, seconds) of one clustering."""
    features = _features(scale.clustered, scale.channels)
    cluster(features[: 2 * CONFIG.k1], CONFIG)  # what is imported and set up at first
    before_mb, before = held_mb(), perf_counter()
    cluster(features, CONFIG)
    return max(0.0, peak_mb() - before_mb), perf_counter() - before


def _features(images: int, channels: int) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    identities = max(2, images // IMAGES_PER_IDENTITY)
    centres = random.standard_normal((identities, channels), np.float32)
    features = random.standard_normal((images, channels), np.float32)
    features *= NOISE
    for row, identity in enumerate(random.integers(0, identities, images)):
        features[row] += centres[identity]
        features[row] /= np.linalg.norm(features[row])
    return features


def _ours(task: _Task) -> NDArray[np.int64]:
    members = memberships(task.features, task.nearest, k1=CONFIG.k1, k2=CONFIG.k2, threads=1)
    return cluster_graph(
        near_pairs(members, CONFIG.eps, most=MOST_NEAR * task.nearest.size, threads=1, label="pairs"), CONFIG
    )


def _searched(features: NDArray[np.float32]) -> int:
    return len(_loop(_Task(features, nearest_neighbours(features, CONFIG.k1))))


def _loop(task: _Task) -> NDArray[np.int64]:
    """Labels as they are commonly made: [N, N] memberships, their averages and distances, and an image at a time."""
    features, nearest = task.features, task.nearest
    images, half = len(nearest), round(CONFIG.k1 / 2) + 1

    def mutual(image: int, k: int) -> NDArray[np.int32]:
        ahead = nearest[image, :k]
        return ahead[(nearest[ahead, :k] == image).any(axis=1)]

    mutual_full = [mutual(image, CONFIG.k1) for image in range(images)]
    mutual_half = [mutual(image, half) for image in range(images)]
    members = np.zeros((images, images), np.float32)
    for image, own in enumerate(mutual_full):
        expanded = own
        for other in own:
            its = mutual_half[other]
            if len(np.intersect1d(its, own)) > 2 / 3 * len(its):
                expanded = np.append(expanded, its)
        expanded = np.unique(expanded)
        weights = np.exp(2 * (features[expanded] @ features[image]) - 2)
        members[image, expanded] = weights / weights.sum()
    averaged = np.empty_like(members)
    for image in range(images):
        averaged[image] = members[nearest[image, : CONFIG.k2]].mean(axis=0)
    who = [np.flatnonzero(averaged[:, column]) for column in range(images)]
    distances = np.empty_like(members)
    for image in range(images):
        shared = np.zeros(images, np.float32)
        for column in np.flatnonzero(averaged[image]):
            shared[who[column]] += np.minimum(averaged[image, column], averaged[who[column], column])
        distances[image] = 1 - shared / (2 - shared)
    np.maximum(distances, 0, out=distances)
    return DBSCAN(eps=CONFIG.eps, min_samples=CONFIG.min_samples, metric="precomputed").fit_predict(distances)
