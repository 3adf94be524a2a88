"""Colour work on uint8 views, in place, by cv2, equal to what PIL and torchvision do with the same parameters.

Every operation takes a contiguous RGB view [H, W, 3] and one argument and changes the view. Which operations a view
gets, with which arguments, is decided for a whole batch at a time from numbers of `randomness`.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from datapipe.core.config import JitterConfig, Size
from datapipe.core.randomness import Floats, to_normal
from datapipe.views import crop_boxes
from datapipe.views.spec import Photometric, View

Step = tuple[Callable[[View, Any], None], Any]
"""An operation and its argument."""

ERASE_RATIO = (0.3, 3.3)
"""Height over width of an erased box, torchvision's default."""
ERASE_FILL = (124, 116, 104)
"""ImageNet's mean colour: an erased box is zero once the view is normalised."""

_LEVELS = np.arange(256, dtype=np.float32)
_SIGMA_STEPS = 256  # kernels are kept for multiples of 1/256 pixel: to make one takes as long as to apply it
_ORDERS = tuple(permutations(range(4)))
_TRUNCATE = -0.499  # PIL cuts fractions off, cv2 rounds them: round(x - 0.499) is floor(x) but for the last thousandth


def numbers_needed(photometric: Photometric) -> dict[str, int]:
    """Operation -> uniform numbers per view; an operation that cannot happen draws none."""
    jitter = photometric.jitter
    counts = {
        "jitter": 6 if jitter.probability else 0,
        "white_balance": 4 if jitter.probability and jitter.white_balance else 0,
        "grey": 1 if photometric.grey else 0,
        "blur": 2 if photometric.blur else 0,
        "solarise": 1 if photometric.solarise else 0,
        "erase": 1 + crop_boxes.NUMBERS if photometric.erase else 0,
    }
    return {operation: count for operation, count in counts.items() if count}


def plan(photometric: Photometric, unit: dict[str, Floats], size: Size, count: int) -> list[list[Step]]:
    """The steps of each of `count` views of this size, from the numbers that `numbers_needed` asked for."""
    steps: list[list[Step]] = [[] for _ in range(count)]
    if "jitter" in unit:
        _plan_jitter(photometric.jitter, unit, steps)
    if "grey" in unit:
        _append(steps, unit["grey"][:, 0] < photometric.grey, grey, [None] * count)
    if "blur" in unit:
        low, high = photometric.blur_sigma
        sigmas = low + (high - low) * unit["blur"][:, 1]
        _append(steps, unit["blur"][:, 0] < photometric.blur, blur, sigmas.tolist())
    if "solarise" in unit:
        _append(steps, unit["solarise"][:, 0] < photometric.solarise, solarise, [None] * count)
    if "erase" in unit:
        areas = crop_boxes.erasures(unit["erase"][:, 1:], size, photometric.erase_area, ERASE_RATIO)
        _append(steps, unit["erase"][:, 0] < photometric.erase, erase, areas.tolist())
    return steps


def _append(
    steps: list[list[Step]], chosen: NDArray[np.bool_], operation: Callable[..., None], arguments: list[Any]
) -> None:
    for row in np.flatnonzero(chosen).tolist():
        steps[row].append((operation, arguments[row]))


def _plan_jitter(jitter: JitterConfig, unit: dict[str, Floats], steps: list[list[Step]]) -> None:
    """White balance, then torchvision's ColorJitter: up to four operations in random order."""
    chosen, *drawn, order = unit["jitter"].T
    jittered = chosen < jitter.probability
    if "white_balance" in unit:
        gains = np.exp(jitter.white_balance * to_normal(unit["white_balance"])[:, :3])
        _append(steps, jittered, white_balance, list(gains))
    limits = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    operations = (brightness, contrast, saturation, hue)
    lowest = [max(0.0, 1 - limit) for limit in limits[:3]] + [-limits[3]]
    highest = [1 + limit for limit in limits[:3]] + [limits[3]]
    arguments = [(low + (high - low) * u).tolist() for low, high, u in zip(lowest, highest, drawn, strict=True)]
    orders = (order * len(_ORDERS)).astype(np.int64).tolist()
    for row in np.flatnonzero(jittered).tolist():
        kinds = [kind for kind in _ORDERS[orders[row]] if limits[kind]]
        steps[row].extend((operations[kind], arguments[kind][row]) for kind in kinds)


def brightness(view: View, factor: float) -> None:
    """PIL's ImageEnhance.Brightness: every value times `factor`."""
    _blend_with(view, 0, factor)


def contrast(view: View, factor: float) -> None:
    """PIL's ImageEnhance.Contrast: away from (factor > 1) or towards the view's mean grey."""
    _blend_with(view, _mean_grey(view), factor)


def saturation(view: View, factor: float) -> None:
    """PIL's ImageEnhance.Color: away from or towards the view's own grey image."""
    plain = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    cv2.addWeighted(view, factor, plain, 1 - factor, _TRUNCATE, dst=view)


def hue(view: View, turns: float) -> None:
    """Torchvision's adjust_hue: the hue, in 256 levels, moved by this share of the colour circle."""
    levels = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    levels[..., 0] += np.uint8(int(turns * 255) & 255)
    cv2.cvtColor(levels, cv2.COLOR_HSV2RGB_FULL, dst=view)


def white_balance(view: View, gains: Floats) -> None:
    """Red, green and blue each times its gain, as another camera's setting would."""
    table = np.clip(_LEVELS[:, None, None] * gains.astype(np.float32), 0, 255).astype(np.uint8)
    cv2.LUT(view, table, dst=view)


def grey(view: View, _: None = None) -> None:
    """The luma (ITU-R 601) in all three channels."""
    cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, dst=view)


def blur(view: View, sigma: float) -> None:
    """PIL's GaussianBlur, which is three box blurs: its kernel, applied at once, costs half of a true Gaussian's."""
    kernel = _pil_kernel(round(sigma * _SIGMA_STEPS))
    cv2.sepFilter2D(view, -1, kernel, kernel, dst=view, borderType=cv2.BORDER_REPLICATE)


def solarise(view: View, _: None = None) -> None:
    """PIL's ImageOps.solarize: values from 128 on are inverted."""
    cv2.LUT(view, _solarised(), dst=view)


def erase(view: View, box: tuple[int, int, int, int]) -> None:
    """Fill (top, left, height, width) with the mean colour."""
    top, left, height, width = box
    view[top : top + height, left : left + width] = ERASE_FILL


def _blend_with(view: View, level: int, factor: float) -> None:
    """level + factor * (value - level) in single precision, clipped, fraction cut off: PIL's ImagingBlend."""
    table = _LEVELS - level
    table *= factor
    table += level
    if factor > 1:
        np.minimum(table, 255, out=table)
        np.maximum(table, 0, out=table)
    cv2.LUT(view, table.astype(np.uint8), dst=view)


def _mean_grey(view: View) -> int:
    """The mean of PIL's 8-bit luma, rounded as ImageEnhance.Contrast rounds it.

    cv2's weights have one bit less than PIL's, which moves the mean by less than .01: exact integers decide near .5.
    """
    mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
    if abs(mean % 1 - 0.5) > 0.01:
        return int(mean + 0.5)
    luma = (view.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32) + 0x8000) >> 16
    return int(luma.mean() + 0.5)


@lru_cache(maxsize=1)
def _solarised() -> View:
    levels = np.arange(256, dtype=np.uint8)
    return np.where(levels < 128, levels, 255 - levels).astype(np.uint8)


@lru_cache(maxsize=4096)
def _pil_kernel(steps: int) -> NDArray[np.float32]:
    """Three times PIL's extended box of this standard deviation, convolved; odd length.

    The box is l whole pixels to each side and a share `edge` of the next (Gwosdek et al., SSVM 2011; Pillow's
    BoxBlur.c). Ends below a thousandth, a quarter of a grey level, are cut.
    """
    variance = (steps / _SIGMA_STEPS) ** 2 / 3
    whole = int(((12 * variance + 1) ** 0.5 - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([edge, *[1.0] * (2 * whole + 1), edge])
    kernel = np.convolve(np.convolve(box, box), box)
    kernel /= kernel.sum()
    while kernel[0] < 1e-3:
        kernel = kernel[1:-1]
    return (kernel / kernel.sum()).astype(np.float32)
