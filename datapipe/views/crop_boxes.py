"""Pure: random rectangles by torchvision's laws, from numbers drawn elsewhere; a batch at a time.

A box is (top, left, height, width) in pixels. Ratios are width over height for crops and height over width for
erasures, as in torchvision.
"""

import numpy as np
from numpy.typing import NDArray

from datapipe.core.randomness import Floats, Ints

TRIES = 10
NUMBERS = 2 * TRIES + 2
"""Uniform numbers one box uses: area and ratio of each try, then top and left."""


def crops(unit: Floats, height: Ints, width: Ints, scale: tuple[float, float], ratio: tuple[float, float]) -> Ints:
    """RandomResizedCrop.get_params for n images of these sizes; unit [n, NUMBERS] -> int64 [n, 4].

    Area uniform in `scale`, ratio log-uniform, the first of ten tries that fits; else the largest centred box
    whose ratio is allowed.
    """
    tall, wide, fits = _tries(unit, height, width, scale, ratio)
    first = np.argmax(fits, axis=1)[:, None]
    tall, wide = np.take_along_axis(tall, first, axis=1)[:, 0], np.take_along_axis(wide, first, axis=1)[:, 0]
    drawn = np.stack([*_place(unit, height - tall, width - wide), tall, wide], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), drawn, _centre(height, width, ratio))


def nearest(tried: Ints, other: Ints, iou: tuple[float, float]) -> Ints:
    """Choose, of several boxes per image, [tries, n, 4], the first whose overlap with another box is within bounds:
    [n, 4].

    Where none is, the one that comes nearest to the bounds.
    """
    overlap = intersection_over_union(tried, other)
    miss = np.maximum(iou[0] - overlap, overlap - iou[1]).clip(min=0)
    chosen = np.argmin(miss, axis=0)[None, :, None]
    return np.take_along_axis(tried, chosen, axis=0)[0]


def intersection_over_union(one: Ints, other: Ints) -> Floats:
    """Area of the intersection over area of the union, box by box: [..., 4] -> [...]."""
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    shared = (high - low).clip(min=0).prod(axis=-1)
    whole: Floats = one[..., 2:].prod(axis=-1) + other[..., 2:].prod(axis=-1) - shared
    return shared / whole


def erasures(
    unit: Floats,
    size: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    *,
    logarithmic: bool = True,
) -> Ints:
    """RandomErasing.get_params for n views of one size; unit [n, NUMBERS] -> int64 [n, 4], height 0 for none.

    Height over width is log-uniform in `ratio`, or uniform without `logarithmic`."""
    height, width = (np.full(len(unit), side, dtype=np.int64) for side in size)
    wide, tall, _ = _tries(unit, width, height, area, ratio, logarithmic)  # the ratio is the other way round here
    fits = (tall < height[:, None]) & (wide < width[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    tall, wide = np.take_along_axis(tall, first, axis=1)[:, 0], np.take_along_axis(wide, first, axis=1)[:, 0]
    boxes = np.stack([*_place(unit, height - tall, width - wide), tall, wide], axis=1)
    return boxes * fits.any(axis=1, keepdims=True)


def _tries(
    unit: Floats, height: Ints, width: Ints, scale: tuple[float, float], ratio: tuple[float, float],
    logarithmic: bool = True,
) -> tuple[Ints, Ints, NDArray[np.bool_]]:  # fmt: skip
    """Heights and widths of all tries [n, TRIES], and which of them lie inside the image."""
    share = scale[0] + (scale[1] - scale[0]) * unit[:, 0 : 2 * TRIES : 2]
    low, high = np.log(ratio) if logarithmic else ratio
    aspect = low + (high - low) * unit[:, 1 : 2 * TRIES : 2]
    if logarithmic:
        aspect = np.exp(aspect)
    target = share * (height * width)[:, None]
    tall = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    wide = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    return tall, wide, (tall > 0) & (tall <= height[:, None]) & (wide > 0) & (wide <= width[:, None])


def _place(unit: Floats, free_rows: Ints, free_columns: Ints) -> tuple[Ints, Ints]:
    """Top and left, uniform over all places where the box fits."""
    return (
        np.floor(unit[:, 2 * TRIES] * (free_rows + 1)).astype(np.int64),
        np.floor(unit[:, 2 * TRIES + 1] * (free_columns + 1)).astype(np.int64),
    )


def _centre(height: Ints, width: Ints, ratio: tuple[float, float]) -> Ints:
    """Torchvision's fall-back. A side is at least one pixel."""
    aspect = width / height
    tall = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height).astype(np.int64).clip(1, height)
    wide = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width).astype(np.int64).clip(1, width)
    return np.stack([(height - tall) // 2, (width - wide) // 2, tall, wide], axis=1)
