"""The hash is what the definition says, pixel by pixel, and hardly changes with what does not change the picture."""

from fractions import Fraction
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from datapipe.dataset.perceptual_hash import BATCH, DifferenceHashes, difference_hash


def naive_hash(luma: np.ndarray) -> int:
    """The definition in exact fractions: each cell sums its share of every pixel."""
    height, width = luma.shape

    def share(pixel: int, pixels: int, cell: int, parts: int) -> Fraction:
        low, high = Fraction(cell * pixels, parts), Fraction((cell + 1) * pixels, parts)
        return max(Fraction(0), min(high, Fraction(pixel + 1)) - max(low, Fraction(pixel)))

    down = [[share(row, height, cell, 8) for row in range(height)] for cell in range(8)]
    across = [[share(column, width, cell, 9) for column in range(width)] for cell in range(9)]
    brightness = [
        [
            sum(
                int(luma[row, column]) * vertical * horizontal
                for row, vertical in enumerate(down[y])
                if vertical
                for column, horizontal in enumerate(across[x])
                if horizontal
            )
            for x in range(9)
        ]
        for y in range(8)
    ]
    bits = [brightness[y][x + 1] > brightness[y][x] for y in range(8) for x in range(8)]
    return int("".join(str(int(bit)) for bit in bits), 2)


def hash_of(luma: np.ndarray) -> int:
    hashes = DifferenceHashes()
    hashes.add(luma)
    return int(hashes.all()[0])


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 5), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(luma: np.ndarray, quality: int = 95) -> bytes:
    buffer = BytesIO()
    Image.fromarray(luma).convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(8, 9), (5, 4), (16, 27), (41, 23), (64, 36)])
def test_hash__is_the_definition(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for luma in (picture(*size), noise, noise // 255):  # the last one has many ties
        assert hash_of(luma) == naive_hash(luma)


def test_hash__is_exact_for_large_pictures() -> None:
    """Cells of one grey level are equal, however large: not one sum may be rounded."""
    for size in [(257, 256), (1500, 1100), (3001, 2999)]:
        assert hash_of(np.full(size, 251, np.uint8)) == 0


def test_hash__of_a_jpeg_is_of_its_luma() -> None:
    luma = picture(120, 60)
    data = jpeg(luma)
    image = Image.open(BytesIO(data))
    image.draft("L", image.size)
    assert difference_hash(data) == hash_of(np.asarray(image))


def test_hash__stays_where_pictures_look_alike() -> None:
    looks, others = [], []
    for seed in range(20):
        base, other = (difference_hash(jpeg(picture(160, 60, number))) for number in (seed, seed + 100))
        same = (jpeg(picture(160, 60, seed), 70), jpeg(cv2.resize(picture(160, 60, seed), (48, 128))))
        looks += [(base ^ difference_hash(data)).bit_count() for data in same]
        others.append((base ^ other).bit_count())
    assert np.mean(looks) < 2 and min(others) > 10


def test_hashes__keep_the_order_of_bits_and_of_pictures() -> None:
    """Bit 8r + c from the highest: cell (r, c + 1) against cell (r, c)."""
    hashes = DifferenceHashes()
    for number in range(2 * BATCH + 64):
        luma = np.zeros((8, 9), np.uint8)
        row, column = divmod(number % 64, 8)
        luma[row, column + 1 :] = 1
        hashes.add(luma)
    assert hashes.all().tolist() == [1 << (63 - number % 64) for number in range(2 * BATCH + 64)]
    assert not len(DifferenceHashes().all())
