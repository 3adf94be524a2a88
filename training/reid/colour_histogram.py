"""What retrieval reaches without any learning: the yardstick printed beside every score."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from datapipe.formats.images import Undecodable, decode_image

BINS = (8, 4, 4)
"""Hue, saturation, value."""
STRIPES = 6


def colour_histogram(images: Iterable[NDArray[np.uint8] | bytes | Path]) -> NDArray[np.float32]:
    """HSV histograms of six horizontal stripes, [N, 768], of unit length.

    Images are RGB arrays [H, W, 3], encoded bytes or paths. Square roots are taken of the shares, so that the cosine
    similarity of two rows is the mean Bhattacharyya coefficient of the stripes (the Hellinger kernel).
    """
    rows = [_histogram(_rgb(image)) for image in images]
    return np.stack(rows) if rows else np.zeros((0, STRIPES * int(np.prod(BINS))), np.float32)


def _histogram(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    stripes = np.array_split(hsv, STRIPES)
    counts = [cv2.calcHist([stripe], [0, 1, 2], None, BINS, [0, 180, 0, 256, 0, 256]).ravel() for stripe in stripes]
    shares = np.stack(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    return np.sqrt(shares / STRIPES).ravel().astype(np.float32)


def _rgb(image: NDArray[np.uint8] | bytes | Path) -> NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        return image
    data = image.read_bytes() if isinstance(image, Path) else image
    try:
        return decode_image(data)
    except Undecodable as error:
        where = str(image) if isinstance(image, Path) else ""
        raise DataError(f"an image cannot be decoded: {error}", where=where, hint="verify the data set") from error
