"""Antialiased bicubic resizing of uint8 images in whole numbers: the pixels of version 3 of the views' rules.

The arithmetic is that of torch's `_upsample_bicubic2d_aa` on uint8 images, which follows Pillow's `Resample.c` with
weights of 16 bits; torch gives the same bytes several times faster and is handed to `make_views` where it is at hand.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datapipe.views.spec import View

Resize = Callable[[View, View], None]
"""Resizes an image [h, w, 3] into a target [H, W, 3], both uint8, in place. The image need not be contiguous."""
SHARPNESS = -0.5
"""The free coefficient of the cubic convolution kernel (Keys 1981), as in Pillow and torch with antialiasing."""
REACH = 2.0
"""Half the width of the kernel, pixels of the coarser of both images."""
WEIGHT_BITS, MOST_SHIFT = 15, 22
"""A weight is below 2^15 after it was multiplied by 2^shift; the shift is at most 22."""


def resize(image: View, target: View) -> None:
    """Resize `image` [h, w, 3] into `target` [H, W, 3]: columns first, then rows, each pass rounded to 8 bits."""
    target[...] = _resize_rows(_resize_rows(image.swapaxes(0, 1), target.shape[1]).swapaxes(0, 1), target.shape[0])


def _resize_rows(image: View, rows: int) -> View:
    """[h, w, 3] -> [rows, w, 3]."""
    if len(image) == rows:
        return image
    weights, shift = _weights(len(image), rows)
    sums = weights @ image.reshape(len(image), -1).astype(np.float64)  # exact: sums stay far below 2^53
    rounded = np.floor((sums + 2.0 ** (shift - 1)) / 2.0**shift)
    return rounded.clip(0, 255).astype(np.uint8).reshape(rows, *image.shape[1:])


@lru_cache(maxsize=1024)
def _weights(before: int, after: int) -> tuple[NDArray[np.float64], int]:
    """Whole numbers [after, before] that weigh the pixels before, and by how many bits their sums are shifted."""
    step = before / after
    reach, shrink = REACH * max(step, 1.0), 1.0 / max(step, 1.0)
    centre = step * (np.arange(after) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + reach + 0.5).astype(np.int64), before)
    pixels = np.arange(before)
    weights = _kernel((pixels - centre[:, None] + 0.5) * shrink)
    weights *= (pixels >= first[:, None]) & (pixels < stop[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    shift = 0
    while shift < MOST_SHIFT and int(0.5 + weights.max() * 2 ** (shift + 1)) < 2**WEIGHT_BITS:
        shift += 1
    return np.trunc(weights * 2.0**shift + np.copysign(0.5, weights)), shift


def _kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic convolution kernel, [...] -> [...]."""
    x = np.abs(distance)
    near = ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * SHARPNESS
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
