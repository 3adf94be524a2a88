"""Bicubic resizing in NumPy against torch's kernels and Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from datapipe.views import bicubic
from datapipe.views.decode import decode
from tests.datapipe.crop_set import jpegs
from training.config.bicubic import resize as resize_by_torch

SIZES = ((256, 128), (96, 64), (128, 64), (7, 5), (1, 1), (1, 64), (300, 1))


def drawn(height: int, width: int, seed: int) -> np.ndarray:
    """Noise of both extremes, on which every rounding and clipping shows."""
    noise = np.random.default_rng(seed).integers(-200, 456, (height, width, 3))
    return noise.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_resize__has_the_bytes_of_torch(size: tuple[int, int]) -> None:
    shapes = [
        (1, 1),
        (1, 9),
        (17, 1),
        (2, 3),
        (5, 5),
        (64, 32),
        size,
        (31, size[1]),
        (size[0], 45),
        (333, 101),
        (700, 4),
    ]
    for seed, (height, width) in enumerate(shapes):
        image = drawn(height + 2, width + 3, seed)[1:-1, 2:-1]  # a box of a larger image
        ours, torchs = np.zeros((*size, 3), np.uint8), np.zeros((*size, 3), np.uint8)
        bicubic.resize(image, ours)
        resize_by_torch(image, torchs)
        np.testing.assert_array_equal(ours, torchs, err_msg=f"{image.shape} to {size}")


def test_resize__leaves_gradients_on_and_starts_no_thread() -> None:
    before = torch.get_num_threads()
    resize_by_torch(drawn(40, 20, 0), np.zeros((64, 32, 3), np.uint8))
    assert torch.is_grad_enabled() and torch.get_num_threads() == before


@pytest.mark.parametrize("size", [(256, 128), (96, 64)])
def test_resize__is_close_to_pillow_on_crops(size: tuple[int, int]) -> None:
    """Both round to 8 bits between the passes, in another order; that shows where contrast is extreme."""
    found = []
    for data in jpegs(20):
        image, ours = decode(data), np.zeros((*size, 3), np.uint8)
        bicubic.resize(image, ours)
        pillows = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
        found.append(np.abs(ours.astype(int) - pillows))
    differences = np.concatenate([each.ravel() for each in found])
    assert differences.mean() < 0.3 and np.percentile(differences, 99.9) <= 3
