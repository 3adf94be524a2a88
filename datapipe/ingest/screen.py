"""Is a crop usable? Decodes it once, strictly: it is kept as it is, re-encoded once, or quarantined with a reason."""

import io
import struct
import warnings
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from datapipe.core.config import ShardConfig
from datapipe.core.image_formats import FORMATS, MOST_SCANS, scans

JPEG_START = b"\xff\xd8\xff"
ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> the image as it is to be seen
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
TURNED = (5, 6, 7, 8)
TILE = (322, 323)
"""Tags of a TIFF: width and height of its tiles."""
MOST_FRAMES = 100
"""Of an animation, that are counted."""
PLAIN = ("YCbCr", "RGB")
"""Colour spaces of JPEGs that every reader decodes to the same RGB."""
USUAL = ("444", "422", "420", "440", "411")
"""Chroma samplings of which the grey image tells as much as the coloured one: the decoder passes over all coefficients
of all components, and any fault in them is a warning, which strict decoding raises. Only the colours are not made."""


class Reason(StrEnum):
    """Why a crop was quarantined."""

    NOT_AN_IMAGE = "not an image"
    CUT = "cut"
    CORRUPT = "corrupt"
    TOO_SMALL = "too small"
    ABSURD_ASPECT = "absurd aspect"
    BOMB = "decompression bomb"
    ANIMATED = "animated"


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


class _Refusal(Exception):
    """Ends the inspection of a crop from any depth."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.verdict = Refused(reason, detail)


def screen(data: bytes, config: ShardConfig) -> Kept | Refused:
    """Judge one image.

    A colour JPEG that decodes without a warning is kept byte for byte, whatever the file was called. Grey, CMYK, 16-bit
    and EXIF-rotated images and other formats become an upright JPEG of `config.jpeg_quality` (4:2:0); transparency is
    dropped, as training code does. Height, width and luma are those of the result.
    """
    try:
        return _jpeg(data, config) if data.startswith(JPEG_START) else _other(data, config)
    except _Refusal as refusal:
        return refusal.verdict


def _jpeg(data: bytes, config: ShardConfig) -> Kept:
    try:
        height, width, space, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise _Refusal(_cut_or_corrupt(data), str(error)) from error
    orientation = _orientation(data)
    _check_size((width, height) if orientation in TURNED else (height, width), config)
    if (count := scans(data)) > MOST_SCANS:
        raise _Refusal(Reason.BOMB, f"{count:,} scans, of {MOST_SCANS} at most")
    if space not in (*PLAIN, "Gray"):
        return _other(data, config)
    try:
        if space == "YCbCr" and sampling in USUAL and orientation not in UPRIGHT:
            return Kept(data, height, width, _luma(data))
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise _Refusal(_cut_or_corrupt(data), str(error)) from error
    if orientation in UPRIGHT:
        return _encoded(UPRIGHT[orientation](pixels), config)
    return Kept(data, height, width, _luma(data)) if space in PLAIN else _encoded(pixels, config)


def _other(data: bytes, config: ShardConfig) -> Kept:
    """Anything Pillow reads, re-encoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit comes first
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            orientation = image.getexif().get(ORIENTATION, 1)
            height, width = image.height, image.width
            _check_size((width, height) if orientation in TURNED else (height, width), config)
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise _Refusal(Reason.ANIMATED, f"{_frames(image)} frames")
            _check_tile(image, config)
            image.load()
            pixels = _rgb(image)
    except Image.DecompressionBombError as error:
        raise _Refusal(Reason.BOMB, str(error)) from error
    except UnidentifiedImageError as error:
        raise _Refusal(Reason.NOT_AN_IMAGE, "no image format was recognised" if data else "no bytes") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:  # Pillow's many ways
        reason = Reason.CUT if "trunc" in str(error).lower() or isinstance(error, EOFError) else Reason.CORRUPT
        raise _Refusal(reason, str(error)) from error
    return _encoded(UPRIGHT[orientation](pixels) if orientation in UPRIGHT else pixels, config)


def _frames(image: Image.Image) -> str:
    """How many there are, as far as they are counted: finding the next one may take as long as decoding it."""
    try:
        image.seek(MOST_FRAMES)
    except EOFError:
        return str(image.n_frames)  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, struct.error):
        return "several"
    return f"more than {MOST_FRAMES}"


def _check_tile(image: Image.Image, config: ShardConfig) -> None:
    """A tile of a TIFF is unpacked as a whole, however small the image is that it covers."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag, 0) for tag in TILE]
    if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > config.max_pixels:
        raise _Refusal(Reason.BOMB, f"a tile of {sides[1]}x{sides[0]} pixels")


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels [height, width, 3] uint8; 16 bits are scaled to 8 (Pillow's own conversion would clip them)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        grey = np.clip(grey >> 8 if grey.max(initial=0) > 255 else grey, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise _Refusal(Reason.NOT_AN_IMAGE, "floating-point values have no known range")
    return np.asarray(image.convert("RGB"))


def _encoded(pixels: np.ndarray, config: ShardConfig) -> Kept:
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=config.jpeg_quality, colorspace="RGB", colorsubsampling="420"
    )
    return Kept(data, pixels.shape[0], pixels.shape[1], _luma(data))


def _luma(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, colorspace="Gray", strict=True)[..., 0]


def _check_size(size: tuple[int, int], config: ShardConfig) -> None:
    height, width = size
    if height * width > config.max_pixels:
        raise _Refusal(Reason.BOMB, f"{height}x{width} pixels")
    if height < config.min_size[0] or width < config.min_size[1]:
        raise _Refusal(Reason.TOO_SMALL, f"{height}x{width} pixels")
    if max(height, width) > config.max_aspect * min(height, width):
        raise _Refusal(Reason.ABSURD_ASPECT, f"{height}x{width} pixels")


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG; 1 where there is none, or none that can be read."""
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError):
        return 1  # broken metadata say nothing about the pixels, which are decoded strictly all the same


def _cut_or_corrupt(data: bytes) -> Reason:
    return Reason.CORRUPT if b"\xff\xd9" in data[-64:] else Reason.CUT
