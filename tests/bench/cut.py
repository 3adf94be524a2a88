"""What every loader of the bench has to do with a crop's bytes, written once more in the plainest way."""

import random
from math import exp, log, sqrt

import cv2
import numpy as np

from datapipe.views.decode import decode
from tests.bench.specs import GLOBAL, ONE_RATIO, ONE_SCALE


def decoded_and_cut(data: bytes) -> np.ndarray:
    """The bytes as one random resized crop, uint8 [H, W, 3]."""
    out = np.empty((*GLOBAL, 3), np.uint8)
    cut(decode(data), out)
    return out


def cut(image: np.ndarray, out: np.ndarray) -> None:
    """A random resized crop, resized as `datapipe.views.render` does it with "linear"."""
    top, left, height, width = _box(*image.shape[:2])
    shrinks = height > out.shape[0] and width > out.shape[1]
    cv2.resize(
        image[top : top + height, left : left + width],
        out.shape[1::-1],
        dst=out,
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )


def _box(height: int, width: int) -> tuple[int, int, int, int]:
    """Torchvision's law in plain Python; the fall-back, which these proportions hardly need, is the whole image."""
    for _ in range(10):
        area = height * width * random.uniform(*ONE_SCALE)
        ratio = exp(random.uniform(log(ONE_RATIO[0]), log(ONE_RATIO[1])))
        tall, wide = round(sqrt(area / ratio)), round(sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return random.randint(0, height - tall), random.randint(0, width - wide), tall, wide
    return 0, 0, height, width
