"""Jaccard distance of near pairs against the definition read aloud with sets and full matrices; what is refused."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array

from datapipe.core.errors import DataError
from datapipe.core.progress import lines_sent_to
from training.clustering.jaccard import jaccard_neighbours
from training.clustering.settings import ClusteringConfig

ALL = 1 - 1e-9
"""As eps: all pairs that have anything in common."""


def people(seed: int, images: int = 60, count: int = 8, spread: float = 0.5) -> NDArray:
    """Float64 features of all lengths, in clusters, so that neighbourhoods overlap."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((count, 16))
    return (centres[random.integers(0, count, images)] + spread * random.standard_normal((images, 16))) / 4


def naive(features: NDArray, k1: int, k2: int) -> NDArray:
    """[N, N]: sets and full matrices, one image after the other."""
    images = len(features)
    products = features @ features.T
    squared = np.diag(products)[:, None] + np.diag(products) - 2 * products
    np.fill_diagonal(squared, -np.inf)
    ranks = [sorted(range(images), key=lambda other, row=row: (squared[row][other], other))[:k1]
             for row in range(images)]  # fmt: skip

    def mutual(row: int, k: int) -> set[int]:
        return {other for other in ranks[row][:k] if row in ranks[other][:k]}

    encoded = np.zeros((images, images))
    for row in range(images):
        own = mutual(row, k1)
        members = set(own)
        for other in own:
            its = mutual(other, round(k1 / 2) + 1)
            if len(its & own) > 2 / 3 * len(its):
                members |= its
        weights = {other: np.exp(2 * products[row, other] - 2) for other in members}
        for other, weight in weights.items():
            encoded[row, other] = weight / sum(weights.values())
    if k2 > 1:
        encoded = np.stack([encoded[ranks[row][:k2]].mean(axis=0) for row in range(images)])
    shared = np.minimum(encoded[:, None], encoded[None]).sum(axis=2)
    return np.clip(1 - shared / (2 - shared), 0, None)


def filled(graph: csr_array) -> NDArray:
    """[N, N]: 1 where the graph has no entry."""
    matrix = np.ones(graph.shape, graph.dtype)
    entries = graph.tocoo()
    matrix[entries.row, entries.col] = entries.data
    return matrix


@pytest.mark.parametrize(("k1", "k2", "spread"), [
    (30, 6, 0.5), (20, 6, 0.2), (7, 3, 1.0), (6, 1, 0.3), (60, 60, 0.5), (2, 5, 0.1), (1, 1, 0.5),
])  # fmt: skip
def test_jaccard_neighbours__equals_the_definition(k1: int, k2: int, spread: float) -> None:
    features = people(k1, spread=spread)
    expected = naive(features, k1, k2)
    graph = jaccard_neighbours(features, ClusteringConfig(k1=k1, k2=k2, eps=ALL))
    np.testing.assert_allclose(filled(graph), expected, rtol=0, atol=1e-12)
    near = jaccard_neighbours(features, ClusteringConfig(k1=k1, k2=k2, eps=0.6))
    np.testing.assert_allclose(filled(near), np.where(expected <= 0.6, expected, 1), rtol=0, atol=1e-12)
    assert near.nnz == np.count_nonzero((expected <= 0.6) | np.eye(60, dtype=bool))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [0.3, 0.7, 2.0])
def test_jaccard_neighbours__misses_no_near_pair(spread: float, dtype: type) -> None:
    """Candidates are found by a part of each row's entries: by them all the same pairs are near."""
    features = people(9, images=300, count=30, spread=spread).astype(dtype)
    whole = filled(jaccard_neighbours(features, ClusteringConfig(k1=20, eps=ALL)))
    for eps in (0.05, 0.4, 0.6, 0.7, 0.95):
        near = filled(jaccard_neighbours(features, ClusteringConfig(k1=20, eps=eps)))
        np.testing.assert_array_equal(near, np.where(whole <= dtype(eps), whole, 1))
        assert spread < 1 or eps < 0.6 or (whole <= eps).sum() > 300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), k2=st.integers(1, 4), images=st.integers(1, 12))
def test_jaccard_neighbours__of_few_images_and_exact_duplicates(data: st.DataObject, k2: int, images: int) -> None:
    """Small whole numbers: products are exact, and equally near images are exactly equally near."""
    rows = st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), min_size=images, max_size=images)
    features, k1 = np.array(data.draw(rows), np.float64), data.draw(st.integers(1, images))
    graph = jaccard_neighbours(features, ClusteringConfig(k1=k1, k2=k2, eps=ALL))
    found = filled(graph)
    np.testing.assert_allclose(found, naive(features, k1, k2), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    assert not found.diagonal().any() and found.min() >= 0
    entries = graph.tocoo()
    assert sorted(entries.row[entries.row == entries.col]) == list(range(images))  # stored, though zero


def test_jaccard_neighbours__keeps_the_precision_it_is_given() -> None:
    features, config = people(2), ClusteringConfig(k1=10, k2=3, eps=ALL)
    exact, single = jaccard_neighbours(features, config), jaccard_neighbours(features.astype(np.float32), config)
    assert (exact.dtype, single.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(filled(single), filled(exact), rtol=0, atol=1e-5)
    assert jaccard_neighbours(features.astype(np.float16), config).dtype == np.float32


def test_jaccard_neighbours__of_long_features_is_finite() -> None:
    """exp(2 * product) alone would overflow."""
    features = 100 * people(3, spread=0.01).astype(np.float32)
    assert np.isfinite(filled(jaccard_neighbours(features, ClusteringConfig(k1=8)))).all()


def test_jaccard_neighbours__does_not_depend_on_chunks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, config = people(4, images=90), ClusteringConfig(k1=10, k2=3, eps=ALL)
    expected = filled(jaccard_neighbours(features, config, threads=1))
    for rows, terms, chunk_mb, threads in ((7, 1, 1e-6, 1), (64, 500, 0.003, 3)):
        monkeypatch.setattr("training.clustering.k_reciprocal.ROWS", rows)
        monkeypatch.setattr("training.clustering.jaccard.TERMS", terms)
        monkeypatch.setattr("training.clustering.jaccard.PAIRS", rows)
        found = jaccard_neighbours(features, config, threads=threads, chunk_mb=chunk_mb)
        np.testing.assert_allclose(filled(found), expected, rtol=0, atol=1e-12)


def test_jaccard_neighbours__leaves_the_features_as_they_are() -> None:
    features = people(5)
    before = features.copy()
    jaccard_neighbours(features, ClusteringConfig(k1=5))
    np.testing.assert_array_equal(features, before)


@pytest.mark.slow
def test_jaccard_neighbours__holds_no_matrix() -> None:
    images = 8_000
    features = people(6, images=images, count=300, spread=0.4).astype(np.float32)
    tracemalloc.start()
    try:
        jaccard_neighbours(features, ClusteringConfig(), chunk_mb=2.0, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images * images * 4 / 4


def test_jaccard_neighbours__refuses_what_cannot_be_clustered() -> None:
    features = people(7)
    with pytest.raises(DataError, match="fewer images than k1: 29 images, and k1 = 30"):
        jaccard_neighbours(features[:29], ClusteringConfig())
    with pytest.raises(DataError, match=r"\(60,\); expected \(images, channels\)"):
        jaccard_neighbours(features[:, 0], ClusteringConfig())
    features[[3, 8], 5] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 of 60 features are not finite \(the first: row 3\)"):
        jaccard_neighbours(features, ClusteringConfig())


def test_jaccard_neighbours__refuses_collapsed_features() -> None:
    """All at one point: every image would be a neighbour of every other one."""
    config = ClusteringConfig(k1=2, k2=2, eps=0.7)
    assert jaccard_neighbours(np.ones((50, 4)), config).nnz == 50 * 50
    with pytest.raises(DataError, match="collapsed: more than 100 of 300 images"):
        jaccard_neighbours(np.ones((300, 4)), config)


def test_jaccard_neighbours__tells_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datapipe.core.progress.INTERVAL_S", 0.0)
    monkeypatch.setattr("datapipe.core.progress.FIRST_S", 0.0)
    lines: list[str] = []
    with lines_sent_to(lines.append):
        jaccard_neighbours(people(8), ClusteringConfig(), label="epoch 3")
    stages = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    assert stages == ["epoch 3, neighbours", "epoch 3, neighbourhoods", "epoch 3, distances"]
    assert sum("60 of 60 images" in line for line in lines) >= 3
