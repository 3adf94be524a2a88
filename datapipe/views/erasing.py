"""Random erasing (Zhong et al., "Random erasing data augmentation", 2020) of whole views, beside their pixels: where a
rectangle goes, and the noise that takes its place, which goes beyond black and white and so cannot be held by bytes.

What is drawn is a function of (seed, position). Views stay as they are; whoever normalises them writes the rectangles.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datapipe.core.config import Range, Size
from datapipe.core.randomness import Ints, draw, normal
from datapipe.views import crop_boxes

RATIO = (0.3, 1 / 0.3)
"""Height over width of the rectangle."""
CHANNELS = 3


@dataclass(frozen=True)
class ErasingSpec:
    """What the loader must draw for views of `size`."""

    size: Size
    probability: float
    """Share of images that lose a rectangle."""
    area: Range
    """Share of the image, uniform."""
    logarithmic: bool
    """Is height over width log-uniform, rather than uniform?"""
    noise: bool
    """Standard normal noise takes the place of pixels, rather than a constant."""

    @property
    def numbers(self) -> int:
        """At most so many numbers of noise for an image."""
        return CHANNELS * int(self.area[1] * prod(self.size) + sum(self.size) + 1) if self.noise else 0


class Erasures(NamedTuple):
    """The rectangles of n images."""

    rectangle: Ints
    """int64 [n, 4]: top, left, height, width; height 0: none."""
    noise: NDArray[np.float32]
    """float32 [n, spec.numbers]: in each row 3 x height x width numbers, and then what is not looked at."""

    @staticmethod
    def none(spec: ErasingSpec, images: int) -> "Erasures":
        """Room for so many, none erased."""
        return Erasures(np.zeros((images, 4), np.int64), np.zeros((images, spec.numbers), np.float32))

    def rows(self, rows: slice) -> "Erasures":
        """The rectangles of some images, in the same memory."""
        return Erasures(self.rectangle[rows], self.noise[rows])

    def flat(self) -> NDArray[np.float32]:
        """The noise of all rectangles, one behind the other."""
        counts = CHANNELS * self.rectangle[:, 2] * self.rectangle[:, 3]
        rows = (row[:count] for row, count in zip(self.noise, counts, strict=True))
        return np.concatenate([np.empty(0, np.float32), *rows])


def draw_erasures(spec: ErasingSpec, seed: int, positions: Ints, into: Erasures) -> None:
    """Rectangles and noise of the images at these places of the stream, none of them padding."""
    counts = {"erasing/whether": 1, "erasing/box": crop_boxes.NUMBERS}
    unit = draw(seed, counts, positions)
    boxes = crop_boxes.erasures(unit["erasing/box"], spec.size, spec.area, RATIO, logarithmic=spec.logarithmic)
    into.rectangle[:] = boxes * (unit["erasing/whether"] < spec.probability)
    if not spec.noise:
        return
    for row, (_, _, height, width) in enumerate(into.rectangle):
        if count := CHANNELS * int(height * width):
            into.noise[row, :count] = normal(seed, "erasing/noise", positions[row : row + 1], count)[0]
