"""Pseudo identities against scikit-learn's DBSCAN on the whole matrix of distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from datapipe.core.errors import DataError
from training.clustering.dbscan import cluster
from training.clustering.jaccard import jaccard_neighbours
from training.clustering.settings import ClusteringConfig


def photographs(seed: int, images: int = 400, people: int = 30, spread: float = 0.9) -> tuple[NDArray, NDArray]:
    """(unit float32 features, identities): people in a row, some of them twice in the very same image."""
    random = np.random.default_rng(seed)
    identities = random.integers(0, people, images)
    features = random.standard_normal((people, 32))[identities] + spread * random.standard_normal((images, 32))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[random.integers(0, images, 20)] = features[random.integers(0, images, 20)]
    return features.astype(np.float32), identities


def dense(features: NDArray, config: ClusteringConfig) -> NDArray:
    """Labels from the matrix that has the graph's distances and 1 elsewhere."""
    graph = jaccard_neighbours(features, config).tocoo()
    matrix = np.ones(graph.shape, graph.dtype)
    matrix[graph.row, graph.col] = graph.data
    return DBSCAN(eps=config.eps, min_samples=config.min_samples, metric="precomputed").fit_predict(matrix)


@pytest.mark.parametrize("config", [
    ClusteringConfig(), ClusteringConfig(eps=0.7), ClusteringConfig(eps=0.4, k2=1), ClusteringConfig(k1=8, k2=2),
    ClusteringConfig(min_samples=1), ClusteringConfig(min_samples=12, eps=0.5),
])  # fmt: skip
@pytest.mark.parametrize("spread", [0.6, 1.1])
def test_cluster__equals_scikit_learn_on_the_whole_matrix(config: ClusteringConfig, spread: float) -> None:
    features, _ = photographs(1, spread=spread)
    found = cluster(features, config)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, dense(features, config))
    assert len(set(found.tolist())) > 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), images=st.integers(1, 12), min_samples=st.integers(1, 4))
def test_cluster__of_few_images_and_exact_duplicates(data: st.DataObject, images: int, min_samples: int) -> None:
    rows = st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), min_size=images, max_size=images)
    features = np.array(data.draw(rows), np.float64)
    config = ClusteringConfig(k1=data.draw(st.integers(1, images)), k2=2, eps=0.7, min_samples=min_samples)
    np.testing.assert_array_equal(cluster(features, config), dense(features, config))


def test_cluster__finds_the_people() -> None:
    features, identities = photographs(2, people=20, spread=0.3)
    found = cluster(features, ClusteringConfig(k1=15))
    assert np.mean(found == -1) < 0.1
    for label in range(found.max() + 1):
        assert np.unique(identities[found == label], return_counts=True)[1].max() > 0.8 * np.sum(found == label)
    first = [int(np.flatnonzero(found == label)[0]) for label in range(found.max() + 1)]
    assert len(first) >= 18


def test_cluster__refuses_what_cannot_be_clustered() -> None:
    with pytest.raises(DataError, match="fewer images than k1"):
        cluster(np.ones((3, 2), np.float32), ClusteringConfig())
