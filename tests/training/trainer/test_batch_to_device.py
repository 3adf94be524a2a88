"""From slots to normalised tensors, on whatever device there is."""

import numpy as np
import pytest
import torch

from datapipe.stream.batch import Batch
from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.training.tiny_recipe import tiny
from training.config.batch_split import split_batch
from training.config.build import fake_batch, view_spec
from training.config.run_plan import _pinned
from training.nn.distillation_losses import hidden_numbers
from training.trainer.batch_to_device import BatchToDevice

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU absent: pinned slots"))


@pytest.mark.parametrize("name", ["cpu", GPU])
def test_place__normalises_each_micro_batch_of_a_slot(name: str) -> None:
    slot = _pinned((2, 6, 4, 3, 3), np.uint8) if name == "cuda" else np.empty((2, 6, 4, 3, 3), np.uint8)
    assert name == "cpu" or torch.from_numpy(slot).is_pinned()
    slot[...] = np.random.default_rng(0).integers(0, 256, slot.shape)
    rows = np.arange(6)
    batch = Batch({"global": slot}, rows, rows, np.full(6, 1 / 6), rows, rows, 0, 6)
    place = BatchToDevice(torch.device(name))
    parts = [place(part)["global"] for part in batch.micro_batches(4)]
    assert [part.shape for part in parts] == [(2, 4, 3, 4, 3), (2, 2, 3, 4, 3)] and parts[0].device.type == name
    expected = (slot / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(torch.cat(parts, dim=1).cpu(), expected.transpose(0, 1, 4, 2, 3), atol=1e-5)


def test_place__numbers_the_hidden_patches_of_each_micro_batch() -> None:
    config = tiny("personvit_vits", images=6)
    batch = fake_batch(view_spec(config), split_batch(6, 6, 1), config)
    place = BatchToDevice(torch.device("cpu"))
    for part in batch.micro_batches(4):
        views = place(part)
        assert torch.equal(views["hidden"], hidden_numbers(views["mask"])) and len(views["hidden"])
        assert torch.equal(views["mask"].flatten()[views["hidden"]], torch.ones(len(views["hidden"]), dtype=torch.bool))
