"""CLS and part tokens of an image put together as one feature, in the two ways that PASS does it (`make_model.py`
FEAT_FUSION).

Shapes: B images, C channels of a token, P part tokens, F channels of the feature.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Fusion = Literal["cat", "mean"]
FEATURES: Mapping[Fusion, str] = {"cat": "cls+parts", "mean": "cls_parts_mean"}
"""Way -> name of the feature among those that are scored."""


def fused(cls_BC: Tensor, part_BC: Tensor, fusion: Fusion) -> Tensor:
    """CLS with one token that stands for the parts: "cat" [CLS ; part], [B, 2C]; "mean" (CLS + part) / 2, [B, C]."""
    return torch.cat([cls_BC, part_BC], dim=1) if fusion == "cat" else (cls_BC + part_BC) / 2


def fused_tokens(cls_BC: Tensor, parts_BPC: Tensor, fusion: Fusion) -> Tensor:
    """[B, F]: CLS with the mean of the parts; CLS alone where there are none."""
    return fused(cls_BC, parts_BPC.mean(dim=1), fusion) if parts_BPC.shape[1] else cls_BC


def fused_width(width: int, parts: int, fusion: Fusion) -> int:
    """F, of tokens of `width` channels."""
    return width * (2 if parts and fusion == "cat" else 1)
