"""Random erasing of normalised images (Zhong et al., "Random erasing data augmentation", 2020) in two ways.

NOISE is timm's mode "pixel" (`data/random_erasing.py`), for supervised fine-tuning: standard normal noise, which goes
beyond black and white and so cannot be held by bytes. CONSTANT is cluster-contrast-reid's
(`clustercontrast/utils/data/transforms.py` RandomErasing), for unsupervised training: constants that are ImageNet's
mean colour before normalising, written after it. Both are done on the device.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from datapipe.core.randomness import draw, normal
from datapipe.views import crop_boxes
from datapipe.views.normalisation import IMAGENET_MEAN
from training.core.device_copy import to_device

RATIO = (0.3, 1 / 0.3)
"""Height over width of the rectangle."""


class Erasing(NamedTuple):
    """What is erased, and what takes its place."""

    area: tuple[float, float]
    """Share of the image, uniform."""
    logarithmic: bool
    """Is height over width log-uniform, rather than uniform?"""
    fill: tuple[float, ...] = ()
    """A value for each channel, of normalised images; empty: standard normal noise."""


NOISE = Erasing((0.02, 1 / 3), logarithmic=True)
CONSTANT = Erasing((0.02, 0.4), logarithmic=False, fill=IMAGENET_MEAN)


def erase(
    images_BIHW: Tensor, position_B: Tensor, *, probability: float, seed: int, erasing: Erasing = NOISE
) -> Tensor:
    """The images, in some of them a rectangle of noise or of a constant. All is a function of (seed, position); padding
    stays.

    `position_B` is on the host, where numbers are drawn; the noise of all images goes to their device in one transfer.
    """
    position, channels = position_B.numpy(), images_BIHW.shape[1]
    size = tuple(images_BIHW.shape[-2:])
    rectangles = _rectangles(position, size, probability, seed, erasing) if probability else []
    if not rectangles:
        return images_BIHW
    if erasing.fill:
        erased = images_BIHW.clone()
        (fill,) = to_device(np.array([erasing.fill]), images_BIHW.device, images_BIHW.dtype)
        for row, (top, left, height, width) in rectangles:
            erased[row, :, top : top + height, left : left + width] = fill[:, None, None]
        return erased
    sizes = [channels * height * width for _, (_, _, height, width) in rectangles]
    noise = [normal(seed, "erasing/noise", position[row : row + 1], size).ravel()
             for (row, _), size in zip(rectangles, sizes, strict=True)]  # fmt: skip
    moved = to_device(np.concatenate(noise), images_BIHW.device, images_BIHW.dtype).split(sizes)
    erased = images_BIHW.clone()
    for (row, (top, left, height, width)), values in zip(rectangles, moved, strict=True):
        erased[row, :, top : top + height, left : left + width] = values.view(channels, height, width)
    return erased


def _rectangles(
    position: np.ndarray, size: tuple[int, ...], probability: float, seed: int, erasing: Erasing
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(row, (top, left, height, width)) of every image that loses one."""
    counts = {"erasing/whether": 1, "erasing/box": crop_boxes.NUMBERS}
    unit = draw(seed, counts, position.clip(min=0))
    boxes = crop_boxes.erasures(
        unit["erasing/box"], (size[0], size[1]), erasing.area, RATIO, logarithmic=erasing.logarithmic
    )
    chosen = (unit["erasing/whether"][:, 0] < probability) & (position >= 0) & (boxes[:, 2] > 0)
    return [(int(row), tuple(boxes[row].tolist())) for row in np.flatnonzero(chosen)]
