"""Jaccard distances and the labels of DBSCAN on them equal those of cluster-contrast and PASS."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.golden import golden, tolerance
from training.clustering.dbscan import cluster
from training.clustering.jaccard import jaccard_neighbours
from training.clustering.settings import ClusteringConfig

ALL = 1 - 1e-6
"""As eps: pairs that are left out are as good as 1 apart."""


@pytest.mark.parametrize(("item", "group", "k2"), [
    ("jaccard_dbscan", "", None), ("jaccard_unnormalised", "", None), ("jaccard_unnormalised", "k2_1/", 1),
])  # fmt: skip
def test_jaccard__equals_the_reference(item: str, group: str, k2: int | None) -> None:
    about, tensors = golden(item)
    features, expected, labels = (
        tensors[name].numpy() for name in ("features", f"{group}jaccard_distance", f"{group}labels")
    )
    chosen = about["hyper_parameters"]
    settings = {"k1": chosen["k1"], "k2": k2 or chosen["k2"], "min_samples": chosen["min_samples"]}
    config = ClusteringConfig(eps=chosen["eps"], **settings)
    allowed = tolerance(about, "jaccard_distance")

    whole, entries = distances(features, eps=ALL, settings=settings)
    assert np.abs(whole - expected).max() <= allowed and entries > np.count_nonzero(expected <= config.eps)
    near, entries = distances(features, eps=config.eps, settings=settings)
    wanted = expected <= config.eps
    assert np.abs(near - expected)[wanted].max() <= allowed
    assert (near[~wanted] == 1).all() and entries == np.count_nonzero(wanted) < expected.size
    np.testing.assert_array_equal(cluster(features, config), labels)
    np.testing.assert_array_equal(cluster(features.astype(np.float64), config, chunk_mb=0.01), labels)


def distances(features: NDArray, *, eps: float, settings: dict[str, Any]) -> tuple[NDArray, int]:
    """(the whole matrix, 1 where pairs are left out; entries of the graph)."""
    graph = jaccard_neighbours(features, ClusteringConfig(eps=eps, **settings), chunk_mb=0.01).tocoo()
    matrix = np.ones(graph.shape, graph.dtype)
    matrix[graph.row, graph.col] = graph.data
    return matrix, graph.nnz
