from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import difference, golden, group, tolerance
from training.backbone import BackboneConfig, VisionTransformer
from training.weights import load_counted


def build(about: dict[str, Any], state: dict[str, Tensor], *, parts: int, resize: bool = False) -> VisionTransformer:
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
    )
    backbone = VisionTransformer(config, parts=parts)
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
    backbone = build(about, group(tensors, "state/"), parts=0)
    for kind in ("global", "local"):
        cls = backbone.features(tensors[f"{kind}_input"]).cls
        assert difference(cls, tensors[f"{kind}_cls"]) < tolerance(about, "output")
    table = backbone.patch_positions(*about["hyper_parameters"]["local_grid"])
    assert difference(table, tensors["local_pos_table"][:, 1:]) < tolerance(about, "output")
    assert torch.equal(backbone.pos_embed[:, :1], tensors["local_pos_table"][:, :1])
