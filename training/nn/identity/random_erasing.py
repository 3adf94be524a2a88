"""Random erasing of normalised images (Zhong et al., "Random erasing data augmentation", 2020) in two ways.

NOISE is timm's mode "pixel" (`data/random_erasing.py`), for supervised fine-tuning: standard normal noise. CONSTANT is
cluster-contrast-reid's (`clustercontrast/utils/data/transforms.py` RandomErasing), for unsupervised training: constants
that are ImageNet's mean colour before normalising, written after it. The loader draws rectangles and noise
(`datapipe/views/erasing.py`); they are written on the device.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from datapipe.views.erasing import CHANNELS, ErasingSpec
from datapipe.views.normalisation import IMAGENET_MEAN
from training.core.device_copy import to_device


class Erasing(NamedTuple):
    """What is erased, and what takes its place."""

    area: tuple[float, float]
    """Share of the image, uniform."""
    logarithmic: bool
    """Is height over width log-uniform, rather than uniform?"""
    fill: tuple[float, ...] = ()
    """A value for each channel, of normalised images; empty: standard normal noise."""

    def spec(self, size: tuple[int, int], probability: float) -> ErasingSpec | None:
        """What the loader must draw; None: nothing is erased."""
        if not probability:
            return None
        return ErasingSpec(size, probability, self.area, self.logarithmic, noise=not self.fill)


NOISE = Erasing((0.02, 1 / 3), logarithmic=True)
CONSTANT = Erasing((0.02, 0.4), logarithmic=False, fill=IMAGENET_MEAN)


def erase(images_BIHW: Tensor, rectangle_B4: np.ndarray, noise: Tensor, fill: tuple[float, ...] = ()) -> Tensor:
    """The images, in some of them a rectangle of noise or of a constant: a copy, unless nothing is erased.

    `rectangle_B4` on the host: top, left, height, width; height 0: none. `noise`: the numbers of all rectangles
    [channels, height, width], one behind the other, on the device; `fill`: a value for each channel in their place.
    """
    chosen = [(row, *place) for row, place in enumerate(rectangle_B4.tolist()) if place[2]]
    if not chosen:
        return images_BIHW
    erased = images_BIHW.clone()
    if fill:
        (colour,) = to_device(np.array([fill]), images_BIHW.device, images_BIHW.dtype)
        values: Iterable[Tensor] = (colour[:, None, None] for _ in chosen)
    else:
        pieces = noise.split([CHANNELS * height * width for *_, height, width in chosen])
        values = (piece.view(CHANNELS, *place[3:]) for piece, place in zip(pieces, chosen, strict=True))
    for (row, top, left, height, width), value in zip(chosen, values, strict=True):
        erased[row, :, top : top + height, left : left + width] = value
    return erased
