"""Exact nearest neighbours by squared Euclidean distance, from products a few rows at a time.

No image x image matrix is held, and nothing is sorted but the candidates of a row.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from datapipe.core.progress import QUIET_S, Progress

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
T = TypeVar("T")
Chunk = tuple[int, Floats]
"""(first row, distances [rows, G]); overwritten while it is worked on."""

CHUNK_MB = 64.0
"""Distances held at once, in megabytes (10^6 bytes)."""
GROUP = 64
"""Neighbouring distances whose smallest one is looked at to find the nearest of all."""


def refuse_unfit(features: Floats, what: str) -> None:
    """Raise DataError unless features have the shape [images, channels] and are finite; `what` names them."""
    if features.ndim != 2:
        raise DataError(f"{what} have shape {features.shape}; expected (images, channels)")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(features)} {what} are not finite (the first: row {bad[0]})",
            hint="the weights may be broken, or the precision too low: evaluate in fp32",
        )


def nearest_neighbours(
    features: Floats, k: int, *, chunk_mb: float = CHUNK_MB, threads: int = 2, label: str = "neighbours"
) -> NDArray[np.int32]:
    """[N, k]: the k nearest of all images [N, C] to each, k at most N, by the features as they are: they need not be of
    length 1.

    The image itself is always the first, whatever its exact duplicates; equally near ones keep their order. `label`:
    what its progress is called.
    """
    squares = np.einsum("nc,nc->n", features, features)

    def look(first: int, rows: Floats) -> list[NDArray[np.int32]]:
        found = np.empty((len(rows), k), np.int32)
        for row, distances in enumerate(rows):
            distances += squares
            distances[first + row] = -np.inf
            found[row] = nearest(distances, k)
        return [found]

    with Progress(label, len(features), unit="images", quiet_s=QUIET_S) as progress:
        chunks = progress.over(distance_chunks(features, features, chunk_mb), lambda chunk: len(chunk[1]))
        return np.concatenate(list(in_slices(chunks, look, threads)))


def distance_chunks(these: Floats, those: Floats, chunk_mb: float) -> Iterator[Chunk]:
    """-2 times the products of the rows [Q, C] with [G, C]: their squared Euclidean distances less the squares of both
    rows (less 2, where they are of length 1); one buffer, overwritten by the next chunk."""
    rows = max(1, min(len(these), int(chunk_mb * 1e6 / max(1, those.itemsize * len(those)))))
    buffer = np.empty((rows, len(those)), those.dtype)
    for start in range(0, len(these), rows):
        part = these[start : start + rows]
        yield start, np.matmul(-2 * part, those.T, out=buffer[: len(part)])


def in_slices(chunks: Iterable[Chunk], work: Callable[[int, Floats], list[T]], threads: int) -> Iterator[T]:
    """What `work(first row, distances)` makes of the chunks, in order; each is cut among the threads.

    numpy compares and counts without the interpreter's lock.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for start, block in chunks:
            cuts = np.linspace(0, len(block), threads + 1).astype(int).tolist()
            parts = pool.map(work, [start + low for low in cuts[:-1]], np.split(block, cuts[1:-1]))
            yield from chain.from_iterable(parts)


def nearest(row: Floats, top_k: int) -> NDArray[np.int64]:
    """[top_k]: places of the smallest numbers below infinity in ascending order, equal ones in theirs; -1 where there
    are no more."""
    first = np.full(top_k, -1, np.int64)
    if top_k:
        candidates = np.flatnonzero((row <= _border(row, top_k)) & (row < np.inf))
        best = candidates[np.argsort(row[candidates], kind="stable")][:top_k]
        first[: len(best)] = best
    return first


def _border(row: Floats, top_k: int) -> np.floating | float:
    """At least `top_k` numbers are no larger, and not many more: the top_k-th smallest of the groups' smallest."""
    groups = np.minimum.reduceat(row, np.arange(0, len(row), GROUP))
    if top_k < len(groups):
        return np.partition(groups, top_k - 1)[top_k - 1]
    return np.partition(row, top_k - 1)[top_k - 1] if top_k < len(row) else np.inf
