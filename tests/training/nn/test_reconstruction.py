import math

import pytest
import torch
from torch import Tensor

from training.nn import reconstruction


def images() -> Tensor:
    return torch.randn(2, 3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1


def naive_patch(image: Tensor, patch: int, row: int, column: int) -> list[list[float]]:
    """Values of one patch, channel by channel, each row by row."""
    top, left = row * patch, column * patch
    return [[float(image[channel, top + y, left + x]) for y in range(patch) for x in range(patch)]
            for channel in range(3)]  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "mae", "bootmae"])
@pytest.mark.parametrize("patch", [2, 4])
def test_pixel_target__equals_naive_loops(norm: reconstruction.PixelNorm, patch: int) -> None:
    found = reconstruction.pixel_target(images(), patch, norm)
    rows, columns = 8 // patch, 4 // patch
    assert found.shape == (2, rows * columns, patch * patch * 3)
    for b, image in enumerate(images()):
        for row in range(rows):
            for column in range(columns):
                channels = naive_patch(image, patch, row, column)
                if norm == "mae":
                    everything = [value for channel in channels for value in channel]
                    channels = [scaled(channel, everything, 1, 1e-6) for channel in channels]
                if norm == "bootmae":
                    channels = [scaled(channel, channel, 0, 1e-5) for channel in channels]
                wanted = [channel[pixel] for pixel in range(patch * patch) for channel in channels]
                assert found[b, row * columns + column].tolist() == pytest.approx(wanted, abs=1e-12)


def scaled(values: list[float], among: list[float], correction: int, eps: float) -> list[float]:
    mean = sum(among) / len(among)
    variance = sum((value - mean) ** 2 for value in among) / (len(among) - correction)
    return [(value - mean) / math.sqrt(variance + eps) for value in values]


def test_errors__equal_naive_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted, target = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    pixels, features = reconstruction.pixel_errors(predicted, target), reconstruction.feature_errors(predicted, target)
    for b in range(2):
        for n in range(3):
            one, other = predicted[b, n].tolist(), target[b, n].tolist()
            wanted = sum((p - t) ** 2 for p, t in zip(one, other, strict=True)) / 5
            assert float(pixels[b, n]) == pytest.approx(wanted, rel=1e-12)
            one, other = scaled(one, one, 0, 1e-6), scaled(other, other, 0, 1e-6)
            wanted = sum((p - t) ** 2 for p, t in zip(one, other, strict=True)) / 5
            assert float(features[b, n]) == pytest.approx(wanted, rel=1e-12)


def test_centre_weights__equal_naive_loops() -> None:
    mask = (torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(2)) < 0.6).double()
    found = reconstruction.centre_weights(mask)
    for b in range(2):
        for row in range(6):
            for column in range(4):
                around = sum(
                    float(mask[b, y, x])
                    for y in range(max(row - 1, 0), min(row + 2, 6))
                    for x in range(max(column - 1, 0), min(column + 2, 4))
                )
                here = float(mask[b, row, column])
                assert float(found[b, row, column]) == pytest.approx(here * (1 + around / 9), rel=1e-12)


def test_over_patches__the_mean_over_images_is_the_mean_over_all_masked_patches() -> None:
    errors = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    loss = reconstruction.over_patches(errors, mask, mask.sum() / 2)
    assert float(loss.mean()) == pytest.approx((1 + 4 + 5) / 3)
