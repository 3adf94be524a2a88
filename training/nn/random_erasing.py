"""Random erasing as timm does it on normalised images: a rectangle of standard normal noise (Zhong et al., "Random
erasing data augmentation", 2020; timm `data/random_erasing.py`, mode "pixel").

It is done on the device after normalising, because its noise goes beyond black and white, which bytes cannot hold.
"""

import numpy as np
from torch import Tensor

from datapipe.core.randomness import draw, normal
from datapipe.views import crop_boxes
from training.core.device_copy import to_device

AREA = (0.02, 1 / 3)
"""Erased share of the image, uniform."""
RATIO = (0.3, 1 / 0.3)
"""Height over width of the rectangle, log-uniform."""


def erase(images_BIHW: Tensor, position_B: Tensor, *, probability: float, seed: int) -> Tensor:
    """The images, in some of them a rectangle of noise. Both are functions of (seed, position); padding stays.

    `position_B` is on the host, where numbers are drawn; the noise of all images goes to their device in one transfer.
    """
    position, channels = position_B.numpy(), images_BIHW.shape[1]
    rectangles = _rectangles(position, tuple(images_BIHW.shape[-2:]), probability, seed) if probability else []
    if not rectangles:
        return images_BIHW
    sizes = [channels * height * width for _, (_, _, height, width) in rectangles]
    noise = [normal(seed, "erasing/noise", position[row : row + 1], size).ravel()
             for (row, _), size in zip(rectangles, sizes, strict=True)]  # fmt: skip
    moved = to_device(np.concatenate(noise), images_BIHW.device, images_BIHW.dtype).split(sizes)
    erased = images_BIHW.clone()
    for (row, (top, left, height, width)), values in zip(rectangles, moved, strict=True):
        erased[row, :, top : top + height, left : left + width] = values.view(channels, height, width)
    return erased


def _rectangles(
    position: np.ndarray, size: tuple[int, ...], probability: float, seed: int
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(row, (top, left, height, width)) of every image that loses one."""
    counts = {"erasing/whether": 1, "erasing/box": crop_boxes.NUMBERS}
    unit = draw(seed, counts, position.clip(min=0))
    boxes = crop_boxes.erasures(unit["erasing/box"], (size[0], size[1]), AREA, RATIO)
    chosen = (unit["erasing/whether"][:, 0] < probability) & (position >= 0) & (boxes[:, 2] > 0)
    return [(int(row), tuple(boxes[row].tolist())) for row in np.flatnonzero(chosen)]
