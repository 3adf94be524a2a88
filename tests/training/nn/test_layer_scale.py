"""A learnt factor per channel at the end of each branch: timm's, in training, export and import alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.storage import open_store
from training.config.build import initial_method
from training.config.run_config import RunConfig
from training.engine.param_groups import group_parameters
from training.methods.dino import DinoConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig, VisionTransformer, parameter_count
from training.weights import export
from training.weights.initialise import InitConfig
from training.weights.published import Stated, read_published

CONFIG = BackboneConfig(arch="custom", size=(64, 32), patch=16, width=24, depth=2, heads=3, layer_scale=0.1)
RUN = RunConfig(backbone=CONFIG, method=DinoConfig(local_size=(32, 16), head=HeadConfig(out_dim=8, hidden=8)))


def scrambled(parts: int = 0) -> VisionTransformer:
    torch.manual_seed(0)
    backbone = VisionTransformer(CONFIG, parts=parts)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


@torch.no_grad()
def test_layer_scale__multiplies_both_branches() -> None:
    backbone, tokens = scrambled().double(), torch.randn(2, 9, 24, dtype=torch.float64)
    block: Any = backbone.blocks[0]
    keep = torch.tensor([[2.0, 0], [2, 2]], dtype=torch.float64)
    wanted = tokens + keep[0, :, None, None] * block.ls1.gamma * block.attn(block.norm1(tokens))
    wanted = wanted + keep[1, :, None, None] * block.ls2.gamma * block.mlp(block.norm2(wanted))
    torch.testing.assert_close(block(tokens, keep), wanted, rtol=0, atol=1e-12)


def test_layer_scale__starts_at_its_value_and_is_absent_at_zero() -> None:
    backbone, without = VisionTransformer(CONFIG), VisionTransformer(replace(CONFIG, layer_scale=0.0))
    assert torch.equal(backbone.get_parameter("blocks.1.ls2.gamma").detach(), torch.full((24,), 0.1))
    assert not any("gamma" in name for name in without.state_dict())
    assert parameter_count(backbone) - parameter_count(without) == 2 * 24 * CONFIG.shape.depth


def test_layer_scale__does_not_decay_and_learns_at_the_rate_of_its_block() -> None:
    method, _ = initial_method(RUN)
    groups = {name: group for group in group_parameters(method, layer_decay=0.5) for name in group.names}
    for block, rate in ((0, 0.25), (1, 0.5)):
        found = groups[f"student.backbone.blocks.{block}.ls1.gamma"]
        assert (found.decay, found.lr_factor) == (False, rate)
    assert groups["student.backbone.blocks.1.attn.proj.weight"].decay


@pytest.mark.parametrize("parts", [0, 3])
@torch.no_grad()
def test_layer_scale__exported_to_timm(parts: int, tmp_path: Path) -> None:
    backbone, images = scrambled(parts), torch.randn(2, 3, 64, 32)
    card = export.export(backbone, open_store(str(tmp_path)), export.Provenance())
    assert "init_values=0.1" in export.create_model_call(card)
    model: Any = eval(export.create_model_call(card), {"timm": timm}).eval()
    report = model.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    assert not report.missing_keys and not report.unexpected_keys
    torch.testing.assert_close(model(images), backbone.features(images).cls, rtol=1e-4, atol=1e-5)
    again = export.load_backbone(str(tmp_path))
    assert again.config == CONFIG
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in again.state_dict().items())


def timm_file(folder: Path, init_values: float | None) -> tuple[Any, str]:
    """A model of timm's with random factors, and a file of its weights."""
    torch.manual_seed(1)
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), embed_dim=24, depth=2, num_heads=3,
                                   num_classes=0, init_values=init_values).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    path = folder / "timm.safetensors"
    save_file(model.state_dict(), path)
    return model, str(path)


@torch.no_grad()
def test_layer_scale__imported_from_timm(tmp_path: Path) -> None:
    model, path = timm_file(tmp_path, 1e-5)
    found = read_published(path, StorageConfig(), Stated(heads=3, depth=2, size=(64, 32)))
    assert found.backbone.config.layer_scale > 0 and found.origin["left_out"] == {}
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(found.backbone.features(images).cls, model(images), rtol=1e-4, atol=1e-5)


def test_layer_scale__a_run_starts_from_weights_that_have_it_too(tmp_path: Path) -> None:
    model, path = timm_file(tmp_path, 1e-5)
    method, _ = initial_method(replace(RUN, init=InitConfig(weights=path)))
    for network in (method.student, method.teacher):
        gamma = network.get_submodule("backbone").get_parameter("blocks.1.ls2.gamma")
        assert torch.equal(gamma, model.blocks[1].ls2.gamma)
    _, path = timm_file(tmp_path, None)
    with pytest.raises(ConfigError, match="layer_scale"):
        initial_method(replace(RUN, init=InitConfig(weights=path)))
