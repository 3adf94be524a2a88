"""A 64-bit hash of how a picture looks: is each part of it brighter than the part to its left?

The luma is averaged over a grid of 8 x 9 cells, whatever the picture's size; bit 8r + c, counted from the highest, is
set where cell (r, c + 1) is brighter than cell (r, c) (dHash: Neal Krawetz, "Kind of Like That", 2013). Cells that
share a pixel split it by area. All sums are of integers and exact, so every machine finds the same hash.
"""

from functools import lru_cache

import numpy as np
import simplejpeg

ROWS, COLUMNS = 8, 9
BITS = 64
_EXACT_IN_FLOAT32 = 2**24


def difference_hash(jpeg: bytes) -> int:
    """The hash of a JPEG as it is stored. Raises ValueError where it cannot be decoded."""
    luma = simplejpeg.decode_jpeg(jpeg, colorspace="Gray", strict=True)[..., 0]
    return int(hashes(cells(luma)[None])[0])


def cells(luma: np.ndarray) -> np.ndarray:
    """Brightness [8, 9] of the cells, up to one common factor, of a picture uint8[height, width]."""
    height, width = luma.shape
    exact = np.float32 if 255 * height * width < _EXACT_IN_FLOAT32 else np.float64
    down, across = _shares(height, ROWS, exact), _shares(width, COLUMNS, exact)
    return down @ luma.astype(exact) @ across.T


def hashes(brightness: np.ndarray) -> np.ndarray:
    """Hashes uint64[n] of `cells` [n, 8, 9]."""
    brighter = brightness[:, :, 1:] > brightness[:, :, :-1]
    return np.packbits(brighter.reshape(-1, BITS), axis=1).view(">u8").astype(np.uint64).ravel()


@lru_cache(maxsize=4096)
def _shares(pixels: int, parts: int, kind: type[np.floating]) -> np.ndarray:
    """[parts, pixels]: how much of each pixel lies in each of `parts` equal parts of the line, in 1 / parts pixels."""
    left = np.arange(pixels) * parts
    begin = np.arange(parts)[:, None] * pixels
    return np.clip(np.minimum(left + parts, begin + pixels) - np.maximum(left, begin), 0, None).astype(kind)
