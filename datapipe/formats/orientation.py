"""How an image is to be turned so that it lies as a viewer shows it; Pillow's `exif_transpose` is the reference."""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
"""EXIF orientation -> the image [height, width, ...] as it is to be seen."""
LYING = (5, 6, 7, 8)
"""Orientations that exchange height and width."""
UPRIGHT = 1
_TRACES = (b"Exif\0\0", b"tiff:Orientation")
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, AttributeError, OverflowError,
               struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow raises where metadata are broken; they say nothing about the pixels then."""


def orientation_of_jpeg(data: bytes) -> int:
    """Orientation 1 to 8 by the JPEG's Exif, or by its XMP where that has none, wherever they stand among the segments;
    1 where there is none, or none that can be read."""
    if not any(trace in data for trace in _TRACES):
        return UPRIGHT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return orientation_of(Image.open(io.BytesIO(data), formats=("JPEG",)))
    except _UNREADABLE:
        return UPRIGHT


def orientation_of(image: Image.Image) -> int:
    """Orientation that is still to be applied to an image of Pillow's. To be asked after loading: Pillow turns TIFFs
    itself while it loads them, and PNGs may tell theirs behind the pixels."""
    try:
        value: Any = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
        return next((number for number in TURNS if number == value), UPRIGHT)
    except _UNREADABLE:
        return UPRIGHT


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image [height, width, ...] as it is to be seen."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels
