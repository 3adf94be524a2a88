import numpy as np
import pytest
import torch
from scipy import stats

from training.nn.identity.random_erasing import NOISE, RATIO, erase

SIZE = (48, 24)


def erased(count: int, *, probability: float = 1.0, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.full((count, 3, *SIZE), 9.0, dtype=torch.float64)
    return images, erase(images, torch.arange(count), probability=probability, seed=seed)


def box_of(image: torch.Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what differs from 9, which no noise is."""
    rows, columns = (np.flatnonzero((image[0] != 9).any(dim=1 - axis).numpy()) for axis in (0, 1))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_erase__a_full_rectangle_of_standard_normal_noise_within_timm_s_bounds() -> None:
    images, found = erased(400)
    assert (images == 9).all(), "the input stays as it is"
    noise = []
    for image in found:
        top, left, height, width = box_of(image)
        piece = image[:, top : top + height, left : left + width]
        assert (piece != 9).all() and int((image != 9).sum()) == piece.numel()
        share = height * width / (SIZE[0] * SIZE[1])
        rounding = (height + width) / (SIZE[0] * SIZE[1])
        assert NOISE.area[0] - rounding < share < NOISE.area[1] + rounding
        assert RATIO[0] * (width - 1) < height + 1 and height - 1 < RATIO[1] * (width + 1)
        noise.append(piece.flatten().numpy())
    assert stats.kstest(np.concatenate(noise)[::17], "norm").pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_erase__as_often_as_asked(probability: float) -> None:
    _, found = erased(1_000, probability=probability)
    count = int((found != 9).flatten(1).any(dim=1).sum())
    assert abs(count - 1_000 * probability) < 4 * (1_000 * probability * (1 - probability)) ** 0.5 + 1


def test_erase__a_function_of_seed_and_position_and_never_of_padding() -> None:
    images, whole = erased(6, probability=0.7)
    part = erase(images[:4], torch.tensor([5, -1, 2, 0]), probability=0.7, seed=3)
    assert torch.equal(part[[0, 2, 3]], whole[[5, 2, 0]]) and torch.equal(part[1], images[1])
    assert not torch.equal(erased(6, probability=0.7, seed=4)[1], whole)
