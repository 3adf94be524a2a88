"""Images of more than 8 bits a channel -> 8 bits, by the range that their values really take.

Infrared, depth and machine-vision cameras write values of 10, 12 or 14 bits into 16: taken for 16 bits, they are a
nearly black image. The range is the smallest of BITS that holds the largest value of an image, unless the file says
which one it is.
"""

import re
import sys
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

BITS = (8, 10, 12, 14, 16)
_SWAPPED = str.maketrans("LBN", "BLB" if sys.byteorder == "little" else "BLL")
SCALED = "ppm"
"""Pillow's decoder of portable pixmaps whose header names the largest value: it scales them to all of 16 bits."""
LARGEST_VALUE = 281
"""TIFF's tag MaxSampleValue."""


class UnknownRange(ValueError):
    """Nothing tells which value is white."""


def to_eight_bits(values: np.ndarray, *, bits: int = 0) -> np.ndarray:
    """Whole numbers, none negative, scaled to uint8 by shifting; `bits`: their range, 0: as the largest one tells.

    Raises UnknownRange for values below 0 or of more than 16 bits.
    """
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high >= 1 << BITS[-1]:
        raise UnknownRange(f"values from {low:,} to {high:,}: which one is white is not known")
    bits = max(bits, high.bit_length()) if bits else next(bits for bits in BITS if high < 1 << bits)
    return (values >> max(0, bits - 8)).astype(np.uint8)


def declared_bits(image: ImageFile) -> int:
    """Range of the values as the file tells it, in bits; 0: it does not. To be asked before the image is loaded."""
    if not image.tile:
        return 0
    if image.tile[0][0] == SCALED:
        return BITS[-1]
    if raw := re.search(r";1[0-5]", _raw_mode(image.tile[0])):
        return int(raw[0][1:])
    largest = getattr(image, "tag_v2", {}).get(LARGEST_VALUE)
    largest = largest[0] if isinstance(largest, tuple) and largest else largest
    return largest.bit_length() if isinstance(largest, int) and BITS[0] < largest.bit_length() <= BITS[-1] else 0


def needs_low_bytes(high: np.ndarray) -> bool:
    """Whether colours of 16 bits, of which Pillow keeps the high bytes, take fewer bits than that."""
    return high.size > 0 and int(high.max()) < 1 << BITS[-2] - 8


def is_wide_colour(image: ImageFile) -> bool:
    """Whether an image that is not loaded yet has several channels of 16 bits."""
    return bool(image.tile) and ";16" in _raw_mode(image.tile[0]) and not image.mode.startswith("I")


def read_low_bytes(image: ImageFile) -> None:
    """Let an image of several channels of 16 bits, not loaded yet, be loaded as the low bytes of its values.

    Raises UnknownRange where Pillow cannot.
    """
    image.tile = [_swapped(tile) for tile in image.tile]


def _raw_mode(tile: Any) -> str:
    """How a tile of Pillow's (codec, place, offset, arguments) lies in the file."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _swapped(tile: Any) -> Any:
    mode, _, order = _raw_mode(tile).partition(";16")
    if mode not in ("RGB", "RGBA", "RGBX") or order not in ("L", "B", "N"):
        raise UnknownRange("16 bits a channel that take fewer: which value is white is not known")
    swapped, arguments = f"{mode};16{order.translate(_SWAPPED)}", tile[3]
    return tile._replace(args=(swapped, *arguments[1:]) if isinstance(arguments, tuple) else swapped)
