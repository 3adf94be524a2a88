"""Exact nearest neighbours against sorting all distances."""

import numpy as np
import pytest

from training.clustering.nearest import nearest_neighbours


@pytest.mark.parametrize(("images", "k"), [(300, 30), (70, 70), (1, 1), (200, 1)])
def test_nearest_neighbours__equals_sorting(images: int, k: int) -> None:
    """Features of all lengths: by the product alone the order would be another one."""
    random = np.random.default_rng(images)
    features = random.standard_normal((images, 12)) * random.uniform(0.2, 3, (images, 1))
    squared = np.square(features[:, None] - features).sum(axis=2)
    expected = np.argsort(squared, axis=1, kind="stable")[:, :k]
    found = nearest_neighbours(features, k, chunk_mb=0.02, threads=3)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert images < 300 or (np.argsort(-features @ features.T, axis=1)[:, :k] != expected).any()


def test_nearest_neighbours__begin_with_the_image_itself_among_exact_duplicates() -> None:
    features = np.array([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    assert nearest_neighbours(features, 3).tolist() == [[0, 2, 3], [1, 4, 0], [2, 0, 3], [3, 0, 2], [4, 1, 0]]
