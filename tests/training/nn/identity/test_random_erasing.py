"""Rectangles that the loader has drawn, written into normalised images."""

import hashlib

import numpy as np
import pytest
import torch

from datapipe.views.erasing import Erasures, draw_erasures
from training.nn.identity.random_erasing import CONSTANT, NOISE, Erasing, erase

SIZE = (48, 24)


def erased(images: torch.Tensor, positions: np.ndarray, erasing: Erasing, probability: float) -> torch.Tensor:
    spec = erasing.spec(SIZE, probability)
    assert spec is not None
    found = Erasures.none(spec, len(images))
    real = int((positions >= 0).sum())
    draw_erasures(spec, 3, positions[:real], found.rows(slice(0, real)))
    return erase(images, found.rectangle, torch.from_numpy(found.flat()).to(images.dtype), erasing.fill)


def test_spec__is_none_where_nothing_is_erased() -> None:
    assert NOISE.spec(SIZE, 0.0) is None
    images = torch.zeros(2, 3, *SIZE)
    assert erase(images, np.zeros((2, 4), np.int64), torch.empty(0)) is images


@pytest.mark.parametrize(("erasing", "digest"), [(NOISE, "b45a3bc7867cdc5c"), (CONSTANT, "ed73e84f95423819")])
def test_erase__writes_the_bits_that_the_first_version_wrote_which_drew_in_the_step(
    erasing: Erasing, digest: str
) -> None:
    images = torch.full((16, 3, *SIZE), 9.0)
    found = erased(images, np.array([*range(100, 115), -1]), erasing, 0.5)
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == digest
    assert (images == 9).all(), "the input stays as it is"
    assert (found[15] == 9).all(), "padding stays as it is"


def test_erase__puts_each_number_at_its_place() -> None:
    images = torch.zeros(3, 3, 5, 4)
    noise = torch.arange(1.0, 1 + 3 * (2 * 3 + 1 * 1))
    found = erase(images, np.array([[1, 1, 2, 3], [0, 0, 0, 0], [4, 3, 1, 1]]), noise)
    assert torch.equal(found[0, :, 1:3, 1:4], noise[:18].view(3, 2, 3)) and torch.equal(found[2, :, 4, 3], noise[18:])
    assert int((found != 0).sum()) == len(noise)
    filled = erase(images, np.array([[1, 1, 2, 3], [0, 0, 0, 0], [4, 3, 1, 1]]), noise[:0], (1.0, 2.0, 3.0))
    assert torch.equal(filled[0, :, 2, 3], torch.tensor([1.0, 2.0, 3.0])) and int((filled != 0).sum()) == len(noise)
