"""Is a crop usable? Decodes it once, strictly: it is kept as it is, re-encoded once, or quarantined with a reason."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import simplejpeg

from datapipe.core.config import ShardConfig
from datapipe.formats.images import (
    GREY,
    JPEG_START,
    PLAIN,
    Reason,
    Size,
    Undecodable,
    decode_rgb_jpeg,
    decode_with_pillow,
    jpeg_fault,
    read_jpeg_header,
)
from datapipe.formats.orientation import TURNS, turned

__all__ = ["RULES", "Kept", "Reason", "Refused", "screen"]

RULES = 2
"""Version of the rules by which crops are screened and read, to be raised whenever another one would be kept, or its
bytes or labels would be others: an ingestion that was begun under other rules is refused."""
USUAL = ("444", "422", "420", "440", "411")
"""Chroma samplings of which the grey image tells as much as the coloured one: the decoder passes over all coefficients
of all components, and any fault in them is a warning, which strict decoding raises. Only the colours are not made."""


@dataclass(slots=True)
class Kept:
    """A usable crop: an upright three-channel JPEG."""

    data: bytes
    height: int
    width: int
    luma: np.ndarray = field(compare=False, repr=False)
    """uint8[height, width]: the brightness that the JPEG holds."""


class Refused(NamedTuple):
    """A crop that is left out."""

    reason: Reason
    detail: str


def screen(data: bytes, config: ShardConfig) -> Kept | Refused:
    """Judge one image.

    A colour JPEG that decodes without a warning is kept byte for byte, whatever the file was called. Grey, CMYK, 16-bit
    and EXIF-rotated images and other formats become, as `decode_image` shows them, an upright JPEG of
    `config.jpeg_quality` (4:2:0). Height, width and luma are those of the result.
    """
    try:
        return _jpeg(data, config) if data.startswith(JPEG_START) else _other(data, config)
    except Undecodable as undecodable:
        return Refused(undecodable.reason, undecodable.detail)


def _jpeg(data: bytes, config: ShardConfig) -> Kept:
    header = read_jpeg_header(data, most_pixels=config.max_pixels)
    _check_size(header.seen, config)
    if header.space not in (*PLAIN, GREY):
        return _other(data, config)
    if header.space == "YCbCr" and header.sampling in USUAL and header.orientation not in TURNS:
        return Kept(data, header.height, header.width, _luma(data))
    pixels = decode_rgb_jpeg(data)
    if header.orientation in TURNS or header.space == GREY:
        return _encoded(turned(pixels, header.orientation), config)
    return Kept(data, header.height, header.width, _luma(data))


def _other(data: bytes, config: ShardConfig) -> Kept:
    """Anything Pillow reads, re-encoded."""
    check = partial(_check_size, config=config)
    return _encoded(decode_with_pillow(data, check, most_pixels=config.max_pixels), config)


def _encoded(pixels: np.ndarray, config: ShardConfig) -> Kept:
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=config.jpeg_quality, colorspace="RGB", colorsubsampling="420"
    )
    return Kept(data, pixels.shape[0], pixels.shape[1], _luma(data))


def _luma(data: bytes) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, colorspace="Gray", strict=True)[..., 0]
    except ValueError as error:
        raise jpeg_fault(data, error) from error


def _check_size(size: Size, config: ShardConfig) -> None:
    height, width = size
    if height < config.min_size[0] or width < config.min_size[1]:
        raise Undecodable(Reason.TOO_SMALL, f"{height}x{width} pixels")
    if max(height, width) > config.max_aspect * min(height, width):
        raise Undecodable(Reason.ABSURD_ASPECT, f"{height}x{width} pixels")
