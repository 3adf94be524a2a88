"""Memberships of neighbourhoods: sparse rows of sum 1, also where a list lacks the image itself."""

import numpy as np

from training.clustering.k_reciprocal import memberships
from training.clustering.nearest import nearest_neighbours


def test_memberships__are_sparse_rows_of_sum_one() -> None:
    random = np.random.default_rng(5)
    features = random.standard_normal((60, 16))[random.integers(0, 60, 400)] + 0.3 * random.standard_normal((400, 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    lists = nearest_neighbours(features, 9)
    for scale in (None, np.full(400, 0.5)):
        found = memberships(features, lists, k1=8, k2=6, scale=scale)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
        assert found.nnz < 0.25 * 400 * 400


def test_memberships__of_an_image_that_is_nobodys_neighbour_are_none() -> None:
    """Among more exact duplicates than a list has places an image may be missing in its own."""
    lists = np.array([[0, 1], [0, 1], [0, 1]])
    found = memberships(np.ones((3, 2)), lists, k1=1, k2=1)
    np.testing.assert_array_equal(found.toarray(), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])
