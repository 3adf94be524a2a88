import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from training.nn.blocks import DroppableBlock
from training.nn.drop_path import Paths, draw_path_masks, on_device
from training.nn.vision_transformer import BackboneConfig, VisionTransformer, parameter_count

CPU = torch.device("cpu")

TINY = BackboneConfig(arch="custom", size=(32, 16), patch=8, width=12, depth=3, heads=3)


def tiny(parts: int = 0, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"arch": "custom", "size": (32, 16), "patch": 8, "width": 12, "depth": 3, "heads": 3, "init_std": 0.3}
    return VisionTransformer(BackboneConfig(**{**settings, **changes}), parts=parts)  # type: ignore[arg-type]


def images(count: int = 4, height: int = 32, width: int = 16) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("parts", "keys"), [(0, 150), (3, 157)])
def test_backbone__has_as_many_tensors_as_the_published_ones(parts: int, keys: int) -> None:
    with torch.device("meta"):
        assert len(VisionTransformer(BackboneConfig(), parts=parts).state_dict()) == keys


PUBLISHED = {"vit_tiny": 5_717_416, "vit_small": 22_050_664, "vit_base": 86_567_656, "vit_large": 304_326_632}
"""Parameters with 224 x 224 images and 1000 classes (DeiT, Touvron et al. 2021: Ti, S, B; ViT, Dosovitskiy et al. 2021,
as in timm: L)."""


@pytest.mark.parametrize("size", [(224, 224), (256, 128), (384, 128), (160, 96)], ids=str)
@pytest.mark.parametrize("arch", list(PUBLISHED))
def test_backbone__parameters_are_the_published_ones(arch: str, size: tuple[int, int]) -> None:
    config = BackboneConfig(arch=arch, size=size)  # type: ignore[arg-type]
    with torch.device("meta"):
        backbone, with_parts = VisionTransformer(config), VisionTransformer(config, parts=3)
    classifier, positions = 1_000 * (backbone.width + 1), (math.prod(config.grid) - 14 * 14) * backbone.width
    assert parameter_count(backbone) == PUBLISHED[arch] - classifier + positions
    assert parameter_count(with_parts) == parameter_count(backbone) + 2 * 3 * backbone.width


def test_backbone__features_of_every_kind_and_size() -> None:
    backbone = tiny(parts=3)
    whole = backbone.features(images())
    assert [tuple(kind.shape) for kind in whole[:3]] == [(4, 12), (4, 3, 12), (4, 8, 12)]
    local = backbone(images(4, 16, 8), part=2)
    assert [tuple(kind.shape) for kind in local[:3]] == [(4, 12), (4, 1, 12), (4, 2, 12)]
    none = backbone(images(4, 48, 16), part=None)
    assert [tuple(kind.shape) for kind in none[:3]] == [(4, 12), (4, 0, 12), (4, 12, 12)]
    assert [tuple(kind.shape) for kind in tiny().features(images())[:3]] == [(4, 12), (4, 0, 12), (4, 8, 12)]
    assert whole.outputs == ()


@torch.no_grad()
def test_backbone__outputs_of_the_blocks_asked_for() -> None:
    backbone = tiny(parts=1)
    found = backbone(images(), blocks=(2, 0, -1))
    assert [tuple(output.shape) for output in found.outputs] == [(4, 10, 12)] * 3
    assert torch.equal(found.outputs[0], found.outputs[2])
    assert torch.equal(backbone.norm(found.outputs[2])[:, 0], found.cls)
    tokens, _ = backbone.embed(images())
    assert torch.equal(found.outputs[1], backbone.blocks[0](tokens))


@torch.no_grad()
def test_backbone__patches_that_are_not_visible_do_not_count() -> None:
    backbone, pictures = tiny(), images()
    visible = torch.tensor([[0, 5], [3, 1], [7, 6], [2, 4]])
    found = backbone(pictures, visible=visible)
    assert found.patches.shape == (4, 2, 12)
    other = pictures.clone()
    for image, patches in enumerate(visible.tolist()):
        for patch in set(range(8)) - set(patches):
            row, column = 8 * (patch // 2), 8 * (patch % 2)
            other[image, :, row : row + 8, column : column + 8] = 9.0
    assert torch.equal(backbone(other, visible=visible).cls, found.cls)
    assert not torch.equal(backbone(other).cls, backbone(pictures).cls)


def test_backbone__chunks_of_rows_have_their_own_part() -> None:
    backbone = tiny(parts=3).double()
    pictures = images(6, 16, 8).double()
    together = backbone(pictures, part=[1, 3, 2])
    for chunk, part in enumerate((1, 3, 2)):
        alone = backbone(pictures[2 * chunk : 2 * chunk + 2], part=part)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[2 * chunk : 2 * chunk + 2], theirs, rtol=0, atol=1e-12)


def test_backbone__tokens_start_as_documented() -> None:
    backbone = VisionTransformer(TINY, parts=2)
    assert not backbone.cls_pos.any()
    assert backbone.cls_token.any() and backbone.get_parameter("part2_pos").any()
    assert backbone.pos_embed.shape == (1, 8, 12)
    assert VisionTransformer(TINY).pos_embed.shape == (1, 9, 12)
    assert backbone.norm.eps == 1e-6
    linear = tiny(width=96, heads=3, init_std=0.05).get_parameter("blocks.0.attn.qkv.weight")
    assert float(linear.detach().std()) == pytest.approx(0.05, rel=0.1)


def test_positions__stored_table_at_native_size_unless_switched() -> None:
    stored, resized = tiny(parts=1), tiny(parts=1, resize_positions_at_native_size=True)
    assert stored.patch_positions(4, 2) is stored.pos_embed
    assert not torch.allclose(resized.patch_positions(4, 2), resized.pos_embed)


def test_drop_path__block_equals_naive() -> None:
    torch.manual_seed(0)
    block = DroppableBlock(12, 3, qkv_bias=True).double()
    tokens, path_masks = torch.randn(3, 5, 12, dtype=torch.float64), torch.tensor([[0, 2, 2.0], [2, 0, 2]])
    ours = block(tokens, path_masks)
    for image in range(3):
        row = tokens[image : image + 1]
        row = row + float(path_masks[0, image]) * block.attn(block.norm1(row))
        row = row + float(path_masks[1, image]) * block.mlp(block.norm2(row))
        torch.testing.assert_close(ours[image : image + 1], row, rtol=0, atol=1e-12)


def _gradients(backbone: VisionTransformer, pictures: Tensor, paths: Paths) -> list[Tensor]:
    backbone.zero_grad()
    tokens = backbone(pictures, path_masks=paths)
    (tokens.cls.sin().sum() + tokens.patches.cos().sum()).backward()
    found = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
    assert len(found) == sum(parameter.requires_grad for parameter in backbone.parameters())
    return [tokens.cls.detach(), tokens.patches.detach(), *found]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_drop_path__kept_images_alone_give_what_factors_give(count: int) -> None:
    """Also where a branch keeps no image at all, which happens with few: every parameter has a gradient."""
    backbone = tiny(drop_path=0.7).double()
    drawn = draw_path_masks([0.0, 0.5, 0.9], seed=3, purpose="x", position=torch.arange(count), views=1)
    assert drawn is not None and (count > 3 or bool((drawn == 0).all(dim=1).any()))
    pictures = images(count).double()
    kept, whole = on_device([drawn], CPU)[0], on_device([drawn], CPU, whole=True)[0]
    assert isinstance(kept, tuple) and isinstance(whole, Tensor)
    sizes = [len(path.rows) for path in kept if path.rows is not None]
    assert sizes and all(1 <= size < max(count, 2) for size in sizes)
    for ours, wanted in zip(_gradients(backbone, pictures, kept), _gradients(backbone, pictures, whole), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


def test_keep_masks__hang_on_seed_and_position_alone() -> None:
    rates = [0.0, 0.2, 0.5]
    position = torch.tensor([7, 1000, 3, -1])
    whole = draw_path_masks(rates, seed=1, purpose="drop_path/global", position=position, views=2)
    assert whole is not None and whole.shape == (6, 8) and whole.dtype == torch.float64
    alone = draw_path_masks(rates, seed=1, purpose="drop_path/global", position=position[1:2], views=2)
    assert alone is not None
    assert torch.equal(whole[:, [1, 5]], alone)  # rows are view-major
    other = draw_path_masks(rates, seed=2, purpose="drop_path/global", position=position, views=2)
    assert other is not None and not torch.equal(whole, other)
    assert draw_path_masks([0.0, 0.0], seed=1, purpose="x", position=position, views=2) is None


def test_keep_masks__values_and_rates() -> None:
    rates = [0.0, 0.2, 0.5]
    masks = draw_path_masks(rates, seed=0, purpose="drop_path/local", position=torch.arange(4000), views=3)
    assert masks is not None
    for row, rate in enumerate([0.0, 0.0, 0.2, 0.2, 0.5, 0.5]):
        assert {float(value) for value in masks[row].unique()} <= {0.0, 1 / (1 - rate)}
        assert float((masks[row] == 0).double().mean()) == pytest.approx(rate, abs=0.02)
    assert abs(float(torch.corrcoef(masks[2:])[0, 1])) < 0.05  # the two branches of a block are independent


def test_activation_checkpointing__same_loss_and_gradients_with_drop_path() -> None:
    path_masks = draw_path_masks([0.0, 0.3, 0.6], seed=0, purpose="x", position=torch.arange(4), views=1)
    results = []
    for checkpointed in (False, True):
        backbone = tiny(parts=2, checkpoint_blocks=checkpointed)
        loss = backbone(images(), path_masks=path_masks).cls.square().sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in backbone.parameters())])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)


def test_attention__fused_equals_plain() -> None:
    plain, fused = (tiny(parts=2, attention=kind).features(images()).cls for kind in ("plain", "fused"))
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="GPU absent: the attention kernel chosen there"))])  # fmt: skip
def test_attention__chosen_by_device_unless_stated(device: str) -> None:
    for attention, fused in (("auto", device == "cuda"), ("plain", False), ("fused", True)):
        backbone = tiny(attention=attention).to(device)
        backbone.features(images().to(device))
        assert {block.attn.fused_attn for block in backbone.blocks} == {fused}


def test_depth_of__for_layer_decay() -> None:
    backbone = tiny(parts=1)
    depths = {name: backbone.depth_of(name) for name, _ in backbone.named_parameters()}
    assert depths["cls_token"] == depths["part1_pos"] == depths["patch_embed.proj.weight"] == 0
    assert depths["blocks.0.norm1.weight"] == 1 and depths["blocks.2.mlp.fc2.bias"] == 3
    assert depths["norm.weight"] == 4


@pytest.mark.parametrize(("changes", "told"), [
    ({"arch": "vit_small", "width": 100, "depth": 2, "heads": 2}, "go with arch"),
    ({"arch": "custom"}, "needs width, depth and heads"),
    ({"arch": "custom", "width": 10, "depth": 1, "heads": 3}, "does not divide width"),
    ({"size": (250, 128)}, "does not divide size"),
])  # fmt: skip
def test_config__mistakes_are_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        BackboneConfig(**changes)  # type: ignore[arg-type]
