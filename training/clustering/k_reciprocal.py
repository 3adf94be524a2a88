"""k-reciprocal encoding (Zhong et al., CVPR 2017), sparse: how much each image belongs to another's neighbourhood.

Re-ranking and clustering share it. They differ in the length of the lists of neighbours they give, and in whether
distances are divided by the largest one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from datapipe.core.parallel import in_order
from datapipe.core.progress import QUIET_S, Progress
from training.clustering.nearest import Floats, Integers

ROWS = 128
"""Images whose neighbourhoods are worked out at once."""


@dataclass(frozen=True)
class _Lists:
    """Neighbours of all images, and whether each is mutual."""

    full: Integers
    """[N, K]"""
    half: Integers
    """[N, about K / 2]: the first columns of `full`."""
    mutual: NDArray[np.bool_]
    """[N, K]: the image is in the full list of its neighbour, too."""
    mutual_half: NDArray[np.bool_]
    """[N, about K / 2]: the image is in the half list of its neighbour, too."""


def memberships(
    features: Floats,
    nearest: Integers,
    *,
    k1: int,
    k2: int,
    scale: Floats | None = None,
    threads: int = 2,
    label: str = "neighbourhoods",
) -> csr_array:
    """[N, N], sparse, rows of sum 1: how much each image belongs to the neighbourhood of each row's image.

    A neighbourhood is the image's mutual neighbours among `nearest` [N, K], nearest first, and the mutual neighbours of
    each of them in its half list (the first k1 / 2, rounded half to even, and one more) where more than two thirds of
    these are the image's own, too. Weights are the softmax of -(2 - 2 cosine), divided by `scale` [N] where given; of
    features that are not of length 1 the product takes the place of the cosine. Rows are then averaged over the first
    k2 neighbours. `label`: what its progress is called.
    """
    half = nearest[:, : int(np.around(k1 / 2)) + 1]
    lists = _Lists(nearest, half, _mutual(nearest), _mutual(half))

    def encode(rows: Integers) -> tuple[Integers, Integers, Floats]:
        return _encoded(features, lists, rows, scale)

    with Progress(label, len(features), unit="images", quiet_s=QUIET_S) as progress:
        coded = in_order(encode, _groups(len(features)), threads=threads)
        parts = list(progress.over(coded, lambda part: len(part[0])))
    counts, columns, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = (len(features), len(features))
    encoded = csr_array((weights, columns, np.concatenate([[0], np.cumsum(counts)])), shape=shape)
    if k2 == 1:
        return encoded
    first = nearest[:, :k2]
    starts = np.arange(0, first.size + 1, first.shape[1])
    mean = csr_array((np.full(first.size, 1 / first.shape[1], features.dtype), first.ravel(), starts), shape=shape)
    return csr_array(mean @ encoded)


def _groups(images: int) -> Iterator[Integers]:
    """Rows of all images, `ROWS` at a time."""
    for start in range(0, images, ROWS):
        yield np.arange(start, min(start + ROWS, images))


def _mutual(nearest: Integers) -> NDArray[np.bool_]:
    """[N, k]: whether the image is among the k nearest of its neighbour as well."""
    is_mutual = np.empty(nearest.shape, bool)
    for rows in _groups(len(nearest)):
        is_mutual[rows] = (nearest[nearest[rows]] == rows[:, None, None]).any(axis=2)
    return is_mutual


def _encoded(
    features: Floats, lists: _Lists, rows: Integers, scale: Floats | None
) -> tuple[Integers, Integers, Floats]:
    """(entries of each row, their columns, their weights), rows and columns ascending: the image's mutual neighbours,
    and those of each of them that shares more than two thirds of its own with the image."""
    images, at = len(features), np.arange(len(rows))
    near, is_mutual = lists.full[rows], lists.mutual[rows]
    further = lists.half[near]  # [rows, K, half]
    is_further = lists.mutual_half[near] & is_mutual[:, :, None]
    is_own = np.zeros((len(rows), images), bool)
    is_own[np.nonzero(is_mutual)[0], near[is_mutual]] = True
    shared = is_own[at[:, None, None], further] & is_further
    is_further &= (shared.sum(axis=2) > 2 / 3 * is_further.sum(axis=2))[:, :, None]
    keys = [(at[:, None] * images + near)[is_mutual], (at[:, None, None] * images + further)[is_further]]
    row, column = np.divmod(_distinct(np.concatenate(keys)), images)
    counts = np.bincount(row, minlength=len(rows))
    return counts, column.astype(np.int32), _weights(features, rows, counts, column, scale)


def _distinct(keys: Integers) -> Integers:
    """Sorted, each once (`np.unique` takes twenty times as long: it hashes)."""
    keys = np.sort(keys)
    return keys[np.concatenate([keys[:1] == keys[:1], keys[1:] != keys[:-1]])]


def _weights(features: Floats, rows: Integers, counts: Integers, columns: Integers, scale: Floats | None) -> Floats:
    """Softmax within each row; the largest exponent is 0, so that none overflows."""
    ends = np.cumsum(counts)
    exponents = np.empty(len(columns), features.dtype)
    for row, start, end in zip(rows, ends - counts, ends, strict=True):
        np.einsum("nc,c->n", features[columns[start:end]], features[row], out=exponents[start:end])
    exponents *= 2
    exponents -= 2
    if scale is not None:
        exponents /= np.repeat(scale[rows], counts)
    filled = counts > 0
    if len(exponents):
        exponents -= np.repeat(np.maximum.reduceat(exponents, (ends - counts)[filled]), counts[filled])
    weights = np.exp(exponents)
    row = np.repeat(np.arange(len(rows)), counts)
    return weights / np.bincount(row, weights, len(rows)).astype(features.dtype)[row]
