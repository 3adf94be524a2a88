"""Pseudo identities: DBSCAN (Ester et al., KDD 1996) on the Jaccard distance of images."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN

from training.clustering.jaccard import jaccard_neighbours
from training.clustering.nearest import CHUNK_MB, Floats
from training.clustering.settings import ClusteringConfig


def cluster(
    features: Floats,
    config: ClusteringConfig,
    *,
    threads: int = 2,
    chunk_mb: float = CHUNK_MB,
    label: str = "cluster",
) -> NDArray[np.int64]:
    """[N]: the cluster of each image [N, C], -1 for outliers; numbered by their first core image, as scikit-learn does.

    scikit-learn takes pairs that a sparse graph lacks for further apart than eps. A border image that several clusters
    reach belongs to the first of them. `label`: what its progress is called. Errors: see `jaccard_neighbours`.
    """
    graph = jaccard_neighbours(features, config, threads=threads, chunk_mb=chunk_mb, label=label)
    return cluster_graph(graph, config)


def cluster_graph(graph: csr_array, config: ClusteringConfig) -> NDArray[np.int64]:
    """[N]: the cluster of each image, -1 for outliers, from the distances of near images [N, N], sparse and symmetric,
    as `jaccard_neighbours` returns them. Numbers as of `cluster`."""
    found = DBSCAN(eps=config.eps, min_samples=config.min_samples, metric="precomputed").fit(graph)
    return np.asarray(found.labels_, np.int64)
