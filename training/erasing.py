"""Random erasing as timm does it on normalised images: a rectangle of standard normal noise (Zhong et al., "Random
erasing data augmentation", 2020; timm `data/random_erasing.py`, mode "pixel").

It is done on the device after normalising, because its noise goes beyond black and white, which bytes cannot hold.
"""

import numpy as np
import torch
from torch import Tensor

from datapipe import boxes
from datapipe.randomness import draw, normal

AREA = (0.02, 1 / 3)
"""Erased share of the image, uniform."""
RATIO = (0.3, 1 / 0.3)
"""Height over width of the rectangle, log-uniform."""


def erase(images_BIHW: Tensor, position_B: Tensor, *, probability: float, seed: int) -> Tensor:
    """The images, in some of them a rectangle of noise. Both are functions of (seed, position); padding stays."""
    if not probability:
        return images_BIHW
    erased = images_BIHW.clone()
    for row, box in _rectangles(position_B.numpy(), tuple(images_BIHW.shape[-2:]), probability, seed):
        top, left, height, width = box
        count = images_BIHW.shape[1] * height * width
        noise = normal(seed, "erasing/noise", position_B[row : row + 1].numpy(), count)
        patch = torch.from_numpy(noise).to(erased).reshape(-1, height, width)
        erased[row, :, top : top + height, left : left + width] = patch
    return erased


def _rectangles(
    position: np.ndarray, size: tuple[int, ...], probability: float, seed: int
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(row, (top, left, height, width)) of every image that loses one."""
    counts = {"erasing/whether": 1, "erasing/box": boxes.NUMBERS}
    unit = draw(seed, counts, position.clip(min=0))
    found = boxes.erasures(unit["erasing/box"], (size[0], size[1]), AREA, RATIO)
    chosen = (unit["erasing/whether"][:, 0] < probability) & (position >= 0) & (found[:, 2] > 0)
    return [(int(row), tuple(found[row].tolist())) for row in np.flatnonzero(chosen)]
