"""What the project asks of simplejpeg, by Pillow: for a machine that has no simplejpeg. Both decode with libjpeg-turbo,
so pixels are the same where both have the same version of it; Pillow takes longer."""

import io
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

SIMPLEJPEG = "simplejpeg"
SPACES = {"RGB": "YCbCr", "L": "Gray", "CMYK": "CMYK"}
"""Pillow's mode -> colour space of the file, as simplejpeg calls it."""
SAMPLINGS = {0: "444", 1: "422", 2: "420"}


def stand_in() -> bool:
    """From now on this process imports this module as simplejpeg, if that is not installed. Processes that it starts
    do not. Returns whether it does."""
    if find_spec(SIMPLEJPEG) is None:
        sys.modules[SIMPLEJPEG] = sys.modules[__name__]
    return sys.modules.get(SIMPLEJPEG) is sys.modules[__name__]


def decode_jpeg(data: bytes, colorspace: str = "RGB", *, strict: bool = True, buffer: Any = None) -> np.ndarray:
    """uint8 [height, width, 3], or [height, width, 1] for "Gray", in `buffer` where one is given. Raises ValueError for
    what is no JPEG or ends early; `strict` is always meant."""
    image = _opened(data)
    mode = {"RGB": "RGB", "Gray": "L"}[colorspace]
    if image.mode == "CMYK":
        raise ValueError("a JPEG in CMYK")
    image.draft(mode, image.size)
    try:
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    pixels = pixels.reshape(image.height, image.width, -1)
    if buffer is None:
        return pixels
    if pixels.nbytes > len(buffer):
        raise ValueError(f"{pixels.nbytes} bytes into {len(buffer)}")
    target = buffer[: pixels.nbytes].reshape(pixels.shape)
    target[...] = pixels
    return np.asarray(target)


def decode_jpeg_header(data: bytes) -> tuple[int, int, str, str]:
    """Height, width, colour space and chroma subsampling. Raises ValueError for what is no JPEG."""
    image = _opened(data)
    space = "RGB" if image.mode == "RGB" and image.info.get("adobe_transform") == 0 else SPACES[image.mode]
    sampling = "Gray" if space == "Gray" else SAMPLINGS.get(JpegImagePlugin.get_sampling(image), "unknown")
    return image.height, image.width, space, sampling


def encode_jpeg(
    image: np.ndarray, quality: int = 85, colorspace: str = "RGB", colorsubsampling: str = "444"
) -> bytes:  # fmt: skip
    """A JPEG of uint8 [height, width, 3] in RGB."""
    written = io.BytesIO()
    subsampling = {name: number for number, name in SAMPLINGS.items()}[colorsubsampling]
    Image.fromarray(image, colorspace).save(written, "JPEG", quality=quality, subsampling=subsampling)
    return written.getvalue()


def _opened(data: bytes) -> JpegImagePlugin.JpegImageFile:
    """Its header is read."""
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a JPEG: {error}") from error
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    return image
