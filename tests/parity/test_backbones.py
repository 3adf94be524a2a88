from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.support.golden import difference, golden, group, tolerance
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.weights.counted_keys import load_counted


def build(
    about: dict[str, Any],
    state: dict[str, Tensor],
    *,
    parts: int = 0,
    resize: bool = False,
    stem: Literal["patch", "ics"] = "patch",
    maskable: bool = False,
) -> VisionTransformer:
    settings = about["hyper_parameters"]
    config = BackboneConfig(
        arch="custom",
        size=tuple(settings["img_size"]),
        patch=settings["patch_size"],
        width=settings["embed_dim"],
        depth=settings["depth"],
        heads=settings["num_heads"],
        mlp_ratio=settings["mlp_ratio"],
        resize_positions_at_native_size=resize,
        stem=stem,
    )
    backbone = VisionTransformer(config, parts=parts, maskable=maskable)
    load_counted(backbone, state)
    return backbone


@pytest.mark.parametrize(("positions", "resize"), [("stored_pos", False), ("interpolated_pos", True)])
@torch.no_grad()
def test_pass_backbone__globals(positions: str, resize: bool) -> None:
    about, tensors = golden("pass_backbone")
    state = group(tensors, "state/")
    parts = sum(name.startswith("part_token") for name in state)
    backbone = build(about, state, parts=parts, resize=resize)
    if resize:
        table = backbone.patch_positions(*about["hyper_parameters"]["grid"])
        assert difference(table, tensors["pos_table_global_interpolated"]) < tolerance(about, "output")
    seen = backbone.features(tensors["global_input"])
    assert difference(seen.cls, tensors[f"global_cls_{positions}"]) < tolerance(about, "output")
    for part in range(parts):
        theirs = tensors[f"global_pt{part + 1}_{positions}"]
        assert difference(seen.parts[:, part], theirs) < tolerance(about, "output")


@torch.no_grad()
def test_pass_backbone__locals_of_each_area() -> None:
    about, tensors = golden("pass_backbone")
    state = group(tensors, "state/")
    parts = sum(name.startswith("part_token") for name in state)
    backbone = build(about, state, parts=parts)
    table = backbone.patch_positions(*about["hyper_parameters"]["local_grid"])
    assert difference(table, tensors["pos_table_local"]) < tolerance(about, "output")
    for area in range(1, parts + 1):
        seen = backbone(tensors[f"area{area}_input"], part=area)
        assert difference(seen.cls, tensors[f"area{area}_cls"]) < tolerance(about, "output")
        assert difference(seen.parts[:, 0], tensors[f"area{area}_part"]) < tolerance(about, "output")


@torch.no_grad()
def test_transreid_ssl_backbone() -> None:
    about, tensors = golden("transreid_ssl_backbone")
    backbone = build(about, group(tensors, "state/"))
    for kind in ("global", "local"):
        cls = backbone.features(tensors[f"{kind}_input"]).cls
        assert difference(cls, tensors[f"{kind}_cls"]) < tolerance(about, "output")
    table = backbone.patch_positions(*about["hyper_parameters"]["local_grid"])
    assert difference(table, tensors["local_pos_table"][:, 1:]) < tolerance(about, "output")
    assert torch.equal(backbone.pos_embed[:, :1], tensors["local_pos_table"][:, :1])


@torch.no_grad()
def test_transreid_ssl_ics_backbone() -> None:
    about, tensors = golden("transreid_ssl_ics_backbone")
    backbone = build(about, group(tensors, "state/"), stem="ics").eval()
    for kind in ("global", "local"):
        cls = backbone.features(tensors[f"{kind}_input"]).cls
        assert difference(cls, tensors[f"{kind}_cls"]) < tolerance(about, "output")
    stem = backbone.patch_embed(tensors["local_input"])
    assert difference(stem, tensors["local_stem_tokens"]) < tolerance(about, "output")


@torch.no_grad()
def test_ibot_backbone__masked_unmasked_and_smaller() -> None:
    about, tensors = golden("ibot_backbone")
    backbone = build(about, group(tensors, "state/"), maskable=True)
    images, mask = tensors["input"], tensors["mask"].flatten(1)
    for name, seen in {
        "tokens_masked": backbone(images, mask=mask),
        "tokens_unmasked": backbone(images),
        "local_tokens": backbone(tensors["local_input"]),
    }.items():
        ours = torch.cat([seen.cls[:, None], seen.patches], dim=1)
        assert difference(ours, tensors[name]) < tolerance(about, "output"), name
    grid = [side // about["hyper_parameters"]["patch_size"] for side in tensors["local_input"].shape[-2:]]
    table = torch.cat([backbone.pos_embed[:, :1], backbone.patch_positions(*grid)], dim=1)
    assert difference(table, tensors["local_pos_table"]) < tolerance(about, "output")


@torch.no_grad()
def test_ibot_backbone__on_rectangles_has_the_positions_of_transreid_ssl() -> None:
    """iBOT's own code handles squares only; the two agree where both can be run."""
    about, tensors = golden("transreid_ssl_backbone")
    state = group(tensors, "state/")
    width = about["hyper_parameters"]["embed_dim"]
    backbone = build(about, {**state, "masked_embed": torch.ones(1, width)}, maskable=True)
    table = backbone.patch_positions(*about["hyper_parameters"]["local_grid"])
    assert difference(table, tensors["local_pos_table"][:, 1:]) < tolerance(about, "output")
    assert difference(backbone(tensors["local_input"]).cls, tensors["local_cls"]) < tolerance(about, "output")
