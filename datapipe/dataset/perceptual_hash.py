"""A 64-bit hash of how a picture looks: is each part of it brighter than the part to its left?

The luma is averaged over a grid of 8 x 9 cells, whatever the picture's size; bit 8r + c, counted from the highest, is
set where cell (r, c + 1) is brighter than cell (r, c) (dHash: Neal Krawetz, "Kind of Like That", 2013). Cells that
share a pixel split it by area. All sums are of integers and exact, so every machine finds the same hash.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

ROWS, COLUMNS = 8, 9
BITS = 64
BATCH = 64
"""Pictures whose last steps are done together."""
_EXACT_IN_INT32 = 2**31


def difference_hash(jpeg: bytes) -> int:
    """The hash of a JPEG as it is stored. Raises ValueError where it cannot be decoded."""
    hashes = DifferenceHashes()
    hashes.add(simplejpeg.decode_jpeg(jpeg, colorspace="Gray", strict=True)[..., 0])
    return int(hashes.all()[0])


class DifferenceHashes:
    """The hashes of many pictures, in the order in which they were added."""

    def __init__(self) -> None:
        self._corners: list[np.ndarray] = []
        self._down: list[np.ndarray] = []
        self._across: list[np.ndarray] = []
        self._done: list[np.ndarray] = []

    def add(self, luma: np.ndarray) -> None:
        """A picture uint8[height, width], read from its summed-area table: what is above and left of each corner of a
        cell follows from the four pixels around that corner."""
        height, width = luma.shape
        rows, columns = _edges(height, ROWS), _edges(width, COLUMNS)
        summed = cv2.integral(luma, sdepth=cv2.CV_32S if 255 * height * width < _EXACT_IN_INT32 else cv2.CV_64F)
        self._corners.append(summed.take(rows.pixels, axis=0).take(columns.pixels, axis=1))
        self._down.append(rows.shares)
        self._across.append(columns.shares)
        if len(self._corners) == BATCH:
            self._finish()

    def all(self) -> np.ndarray:
        """uint64[pictures]."""
        if self._corners:
            self._finish()
        return np.concatenate([np.empty(0, np.uint64), *self._done])

    def _finish(self) -> None:
        summed = np.array(self._corners).astype(np.int64)
        summed *= np.array(self._down)[:, :, None]
        summed = summed[:, ::2] + summed[:, 1::2]
        summed *= np.array(self._across)[:, None, :]
        summed = summed[:, :, ::2] + summed[:, :, 1::2]
        cells = np.diff(np.diff(summed, axis=1), axis=2)
        brighter = np.diff(cells, axis=2) > 0
        self._done.append(np.packbits(brighter.reshape(-1, BITS), axis=1).view(">u8").astype(np.uint64).ravel())
        self._corners, self._down, self._across = [], [], []


class _Edges(NamedTuple):
    """Where a line of pixels is cut into equal parts."""

    pixels: np.ndarray
    """int64[2 * (parts + 1)]: for each edge the whole pixels before it, and one more."""
    shares: np.ndarray
    """int64[2 * (parts + 1)]: how much of either counts, in 1 / parts."""


@lru_cache(maxsize=8192)
def _edges(pixels: int, parts: int) -> _Edges:
    whole, rest = np.divmod(np.arange(parts + 1) * pixels, parts)
    return _Edges(
        np.stack([whole, np.minimum(whole + 1, pixels)], axis=1).ravel(), np.stack([parts - rest, rest], axis=1).ravel()
    )
