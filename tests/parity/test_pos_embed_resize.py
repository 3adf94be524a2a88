import pytest
import torch

from tests.support.golden import difference, golden, tolerance
from training.nn.vision_transformer import BackboneConfig
from training.weights.counted_keys import load_counted
from training.weights.export import unfilled
from training.weights.resize_positions import resized

PATCH = 2


@pytest.mark.parametrize(("table", "expected", "parts"), [
    ("pass/table", "pass/resized", 3), ("cls/table", "cls/resized", 0), ("cls/table", "cls_personvit/resized", 0),
])  # fmt: skip
def test_pos_embed_resize__bilinear_for_fine_tuning(table: str, expected: str, parts: int) -> None:
    about, tensors = golden("pos_embed_resize")
    before, after = ((PATCH * rows, PATCH * columns) for rows, columns in (
        about["hyper_parameters"]["old_grid"], about["hyper_parameters"]["new_grid"]))  # fmt: skip
    width = tensors[table].shape[-1]
    config = BackboneConfig(arch="custom", size=before, patch=PATCH, width=width, depth=1, heads=1)
    backbone = unfilled(config, parts)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in backbone.state_dict().items()}
    load_counted(backbone, {**zeros, "pos_embed": tensors[table]})
    found = resized(backbone, after, "bilinear")
    assert found.config.size == after
    assert difference(found.pos_embed, tensors[expected]) < tolerance(about, "output")
    assert resized(found, after, "bicubic") is found
