"""A backbone for images of another size: the same weights, its position table resized as the references resize it."""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from datapipe.core.config import Size
from datapipe.core.errors import ConfigError
from training.nn.vision_transformer import VisionTransformer
from training.weights.counted_keys import load_counted
from training.weights.export import unfilled

Interpolation = Literal["bicubic", "bilinear"]
"""How a position table is resized. "bicubic": by scale factor, as pre-training does for local views and so for going on
with it (`VisionTransformer.patch_positions`). "bilinear": to the target grid, as TransReID, TransReID-SSL, PASS and
PersonViT do when they load weights for fine-tuning (`vit_pytorch.py` resize_pos_embed)."""


@torch.no_grad()
def resized(backbone: VisionTransformer, size: Size, interpolation: Interpolation) -> VisionTransformer:
    """The backbone with `size` (height, width) as its native one. The positions of CLS and parts stay as they are."""
    if size == backbone.config.size:
        return backbone
    try:
        config = replace(backbone.config, size=size)
    except ValidationError as error:
        raise ConfigError(f"the patch of {backbone.config.patch} does not divide {size}", where="size",
                          hint="sizes are (height, width) in pixels") from error  # fmt: skip
    made = unfilled(config, backbone.parts, maskable=backbone.masked_embed is not None)
    table = _bilinear(backbone, *config.grid) if interpolation == "bilinear" else backbone.patch_positions(*config.grid)
    slot = backbone.pos_embed[:, : 0 if backbone.parts else 1]
    load_counted(made, {**backbone.state_dict(), "pos_embed": torch.cat([slot, table], dim=1)})
    return made.train(backbone.training)


def resizing(before: Size, after: Size, interpolation: Interpolation) -> dict[str, Any]:
    """For a card: what was done to positions."""
    return {} if before == after else {"positions": {"from": before, "to": after, "interpolation": interpolation}}


def _bilinear(backbone: VisionTransformer, rows: int, columns: int) -> Tensor:
    """[1, rows * columns, C]: half-pixel centres, no antialiasing."""
    table = backbone.pos_embed if backbone.parts else backbone.pos_embed[:, 1:]
    grid = table.unflatten(1, backbone.config.grid).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
