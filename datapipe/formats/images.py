"""The one decoder of images that people bring: ingestion, evaluation and frames of videos see the same pixels by it.

JPEG by libjpeg-turbo, strictly; all else, and JPEGs of odd colours, by Pillow. Colours are RGB, values of more than 8
bits are scaled by their real range, transparency is dropped, as training code does, and the image lies as a viewer
shows it.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from datapipe.formats import bit_depth, png_chunks
from datapipe.formats.file_kinds import LOOKED_AT, kind_of_bytes
from datapipe.formats.image_formats import FORMATS, MOST_PIXELS, MOST_SCANS, scans
from datapipe.formats.orientation import LYING, orientation_of, orientation_of_jpeg, turned

TILE = (322, 323)
"""Tags of a TIFF: width and height of its tiles."""
MOST_FRAMES = 100
"""Of an animation, that are counted."""
JPEG_START = b"\xff\xd8\xff"
PLAIN = ("YCbCr", "RGB")
"""Colour spaces of JPEGs that every reader decodes to the same RGB."""
GREY = "Gray"
Size = tuple[int, int]
"""(height, width) in pixels."""
Check = Callable[[Size], None]
"""Called with the size of the image as it is seen, before it is decoded; raises Undecodable where it is not wanted."""


class Reason(StrEnum):
    """Why there are no pixels to be had of a file, or why they are not wanted."""

    NOT_AN_IMAGE = "not an image"
    UNSUPPORTED = "unsupported format"
    CUT = "cut"
    CORRUPT = "corrupt"
    TOO_SMALL = "too small"
    ABSURD_ASPECT = "absurd aspect"
    BOMB = "decompression bomb"
    ANIMATED = "animated"


class Undecodable(Exception):
    """There is no image, or none that can be used."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class JpegHeader(NamedTuple):
    """What a JPEG says of itself before it is decoded."""

    height: int
    """Of the image as it is stored."""
    width: int
    space: str
    sampling: str
    orientation: int
    """1 to 8, as EXIF numbers them."""

    @property
    def seen(self) -> Size:
        """Size of the image as it is seen."""
        return (self.width, self.height) if self.orientation in LYING else (self.height, self.width)


def any_size(size: Size) -> None:
    """The check where no other is given."""
    del size


def decode_image(data: bytes, check: Check = any_size, *, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """RGB uint8 [height, width, 3] of a whole, sound image as it is to be seen. Raises Undecodable."""
    if not data.startswith(JPEG_START):
        return decode_with_pillow(data, check, most_pixels=most_pixels)
    header = read_jpeg_header(data, most_pixels=most_pixels)
    check(header.seen)
    if header.space not in (*PLAIN, GREY):
        return decode_with_pillow(data, check, most_pixels=most_pixels)
    return turned(decode_rgb_jpeg(data), header.orientation)


def read_jpeg_header(data: bytes, *, most_pixels: int = MOST_PIXELS) -> JpegHeader:
    """Raises Undecodable where it is cut, damaged, too large, or of a kind of JPEG that cannot be decoded."""
    try:
        height, width, space, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise jpeg_fault(data, error) from error
    refuse_bombs((height, width), most_pixels)
    if (count := scans(data)) > MOST_SCANS:
        raise Undecodable(Reason.BOMB, f"{count:,} scans, of {MOST_SCANS} at most")
    return JpegHeader(height, width, space, sampling, orientation_of_jpeg(data))


def decode_rgb_jpeg(data: bytes) -> np.ndarray:
    """RGB as it is stored, of a JPEG in PLAIN or GREY. Raises Undecodable, also for what decoders mend in silence."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise jpeg_fault(data, error) from error


def jpeg_fault(data: bytes, error: Exception) -> Undecodable:
    """What libjpeg-turbo's complaint means."""
    if kind := _undecodable_jpeg(data):
        return Undecodable(Reason.UNSUPPORTED, f"{kind}: {error}")
    return Undecodable(Reason.CORRUPT if b"\xff\xd9" in data[-64:] else Reason.CUT, str(error))


def refuse_bombs(size: Size, most_pixels: int) -> None:
    """Raises Undecodable for a size of more pixels."""
    if size[0] * size[1] > most_pixels:
        raise Undecodable(Reason.BOMB, f"{size[0]}x{size[1]} pixels")


def decode_with_pillow(data: bytes, check: Check = any_size, *, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """RGB uint8 [height, width, 3] of whatever Pillow reads, as it is to be seen. Raises Undecodable."""
    try:
        return _load(data, check, most_pixels)
    except Undecodable as undecodable:
        if not data.startswith(png_chunks.SIGNATURE) or undecodable.reason not in (Reason.CORRUPT, Reason.NOT_AN_IMAGE):
            raise
        plain = png_chunks.essential(data)
        if len(plain) == len(data):
            raise
        try:
            return _load(plain, check, most_pixels)
        except Undecodable as still:
            raise (undecodable if still.reason == Reason.CUT else still) from None


def _load(data: bytes, check: Check, most_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of sizes, for which our own limit comes first
            image = _opened(data)
            bits, is_wide = bit_depth.declared_bits(image), bit_depth.is_wide_colour(image)
            _check(image, check, most_pixels)
            image.load()
            pixels = _rgb(image, bits)
            if is_wide and bit_depth.needs_low_bytes(pixels):
                pixels = _by_real_range(pixels, _opened(data), bits)
            return turned(pixels, orientation_of(image))
    except bit_depth.UnknownRange as error:
        raise Undecodable(Reason.UNSUPPORTED, str(error)) from error
    except Image.DecompressionBombError as error:
        raise Undecodable(Reason.BOMB, str(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, KeyError,
            struct.error) as error:  # Pillow's many ways  # fmt: skip
        reason = Reason.CUT if "trunc" in str(error).lower() or isinstance(error, EOFError) else Reason.CORRUPT
        raise Undecodable(reason, str(error)) from error


def _opened(data: bytes) -> ImageFile:
    """Not loaded yet."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check(image: ImageFile, check: Check, most_pixels: int) -> None:
    """Raises Undecodable for a size, or a number of frames, that is not wanted."""
    refuse_bombs((image.height, image.width), most_pixels)
    _refuse_large_tile(image, most_pixels)
    if image.format == "PNG":
        image.load()  # what stands behind the pixels may say how they lie
    orientation = orientation_of(image) if image.format != "TIFF" else 1  # of which Pillow tells the size as it is seen
    check((image.width, image.height) if orientation in LYING else (image.height, image.width))
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Undecodable(Reason.ANIMATED, f"{_frames(image)} frames")


def _frames(image: ImageFile) -> str:
    """How many there are, as far as they are counted: finding the next one may take as long as decoding it."""
    for count in range(1, MOST_FRAMES + 1):
        try:
            image.seek(count)
        except EOFError:
            return str(count)
        except (OSError, SyntaxError, ValueError, struct.error):
            return "several"
    return f"more than {MOST_FRAMES}"


def _refuse_large_tile(image: ImageFile, most_pixels: int) -> None:
    """A tile of a TIFF is unpacked as a whole, however small the image is that it covers."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag, 0) for tag in TILE]
    if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > most_pixels:
        raise Undecodable(Reason.BOMB, f"a tile of {sides[1]}x{sides[0]} pixels")


def _rgb(image: ImageFile, bits: int) -> np.ndarray:
    """Pixels [height, width, 3] uint8 of a loaded image."""
    if image.mode.startswith("I"):
        grey = bit_depth.to_eight_bits(np.asarray(image).astype(np.int64), bits=bits)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise bit_depth.UnknownRange("floating-point values: which one is white is not known")
    try:
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise Undecodable(Reason.UNSUPPORTED, f"colours of the kind {image.mode}: {error}") from error


def _by_real_range(high: np.ndarray, image: ImageFile, bits: int) -> np.ndarray:
    """Colours of 16 bits that take fewer. `image`: not loaded yet."""
    bit_depth.read_low_bytes(image)
    image.load()
    values = high.astype(np.int64) << 8 | np.asarray(image.convert("RGB"))
    return bit_depth.to_eight_bits(values, bits=bits)


def _unidentified(data: bytes) -> Undecodable:
    kind = kind_of_bytes(data[:LOOKED_AT])
    if "image" in kind or kind in PICTURES:
        return Undecodable(Reason.UNSUPPORTED, f"{kind}, which is not read: convert it to JPEG or PNG")
    if kind in OWN:
        return Undecodable(Reason.CORRUPT, f"{kind} whose header cannot be read")
    return Undecodable(Reason.NOT_AN_IMAGE, kind or "no known format")


PICTURES = ("an icon", "a Photoshop file", "a DirectDraw surface", "an SVG drawing")
"""Kinds of files that hold an image and are not read, beside those called so."""
OWN = ("a JPEG", "a PNG", "a GIF", "a WebP image")

_SEGMENT = re.compile(rb"\xff+([\xc0-\xfe])(..)(.)", re.DOTALL)
_FRAMES = {0xC3: "a lossless JPEG", **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "a hierarchical JPEG"),
           0xCB: "a lossless JPEG", 0xF7: "a JPEG-LS image"}  # fmt: skip
_STARTS_OF_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))


def _undecodable_jpeg(data: bytes) -> str:
    """The kind of a JPEG, by its frame header, that libjpeg-turbo does not decode to 8 bits; empty: another fault."""
    place = 2
    while found := _SEGMENT.match(data, place):
        marker = found[1][0]
        if marker in _STARTS_OF_FRAMES:
            return _FRAMES.get(marker) or ("" if found[3][0] == 8 else f"a JPEG of {found[3][0]} bits")
        place = found.start(2) + int.from_bytes(found[2], "big")
    return ""
