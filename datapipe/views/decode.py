"""JPEG bytes -> RGB arrays, in memory that each thread uses again and again.

Images that are allocated one by one and freed together go back to the system, and the next batch has to fetch the pages
again: a fifth of the time of decoding and cropping.
"""

from collections.abc import Iterator, Sequence
from threading import local

import numpy as np
import simplejpeg

from datapipe.formats.image_formats import MOST_PIXELS, MOST_SCANS, scans
from datapipe.formats.images import Undecodable, decode_image
from datapipe.views.spec import View

ROOM_BYTES = 16 << 20
"""Decoded images that a thread holds at a time; pages that are never needed are never touched."""


class _Room(local):
    """A thread's memory for decoded images."""

    def __init__(self) -> None:
        self.bytes = np.empty(ROOM_BYTES, np.uint8)


_room = _Room()


def decode(data: bytes) -> View:
    """RGB uint8 [H, W, 3]; ValueError if the bytes are no image, or one that ends early."""
    if _needs(data) > 3 * MOST_PIXELS or scans(data) > MOST_SCANS:
        raise ValueError("a decompression bomb: too many pixels, or too many scans")
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except (ValueError, RuntimeError):
        pass  # CMYK, or not a JPEG at all: Pillow reads more, slowly
    try:
        return decode_image(data)
    except Undecodable as error:
        raise ValueError(f"not an image: {error}") from error


def decode_runs(jpegs: Sequence[bytes]) -> Iterator[tuple[int, list[View | None]]]:
    """The images in order, as many at a time as there is room for: (number of the first, images); None: no image.

    A run is overwritten when this thread asks for another one.
    """
    first = 0
    while first < len(jpegs):
        images = _run(jpegs, first)
        yield first, images
        first += len(images)


def _run(jpegs: Sequence[bytes], first: int) -> list[View | None]:
    images: list[View | None] = []
    room = _room.bytes
    for number in range(first, len(jpegs)):
        try:
            if scans(jpegs[number]) > MOST_SCANS:
                raise ValueError("too many scans")
            image = simplejpeg.decode_jpeg(jpegs[number], colorspace="RGB", strict=True, buffer=room)
            room = room[image.nbytes :]
        except (ValueError, RuntimeError):
            if images and _needs(jpegs[number]) > len(room):
                break
            image = _decode_or_none(jpegs[number])
        images.append(image)
    return images


def _needs(data: bytes) -> int:
    """Bytes of the decoded image; 0 where even its size is not to be had."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, RuntimeError):
        return 0
    return 3 * height * width


def _decode_or_none(data: bytes) -> View | None:
    try:
        return decode(data)
    except ValueError:
        return None
