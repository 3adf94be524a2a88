"""Projection heads: a small MLP, a unit vector, and its cosines with K prototypes.

Reference: DINO head of TransReID-SSL `dino/vision_transformer.py`, four-fold head of PASS
`PASS/vision_transformer.py`, head of iBOT `models/head.py`. Key names are theirs. The weight norm is computed in our
own forward: the library's hooks rename keys and break where parameters are partitioned.

Shapes: R rows (any leading axes), C channels, K prototypes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from datapipe.core.settings import settings


@settings
class HeadConfig:
    """A projection head."""

    out_dim: int = Field(default=65_536, ge=2)
    """K, the number of prototypes. Published: 65536; short runs on little data learn with a few hundred."""
    hidden: int = Field(default=2_048, ge=1)
    """Width of the hidden layers."""
    bottleneck: int = Field(default=256, ge=1)
    """Width of the unit vector that is compared with the prototypes."""
    layers: int = Field(default=3, ge=1)
    """Linear layers before the prototypes."""
    norm_last_layer: bool = True
    """Keep the length of every prototype at its start value 1; only directions learn. Steadier."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights of the MLP (prototypes start as PyTorch's Linear does)."""


class Prototypes(nn.Module):
    """Bias-free linear layer with rows of learned direction and separate length.

    out[r, k] = sum over c of x[r, c] * weight_g[k] * weight_v[k, c] / |weight_v[k]|
    """

    def __init__(self, channels: int, out_dim: int, *, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(channels, out_dim, bias=False).weight.detach())

    def forward(self, rows_RC: Tensor) -> Tensor:
        # what the library's weight norm calls: one pass over the prototypes each way
        return F.linear(rows_RC, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    """MLP, L2 norm, prototypes: [..., C] -> logits [..., K]."""

    def __init__(self, channels: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = projector(channels, config)
        self.last_layer = Prototypes(config.bottleneck, config.out_dim, norm_last_layer=config.norm_last_layer)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.last_layer(F.normalize(self.mlp(rows), dim=-1))
        return logits


class TokenHeads(nn.Module):
    """One independent head per token, nothing shared: mlp_cls, last_layer_cls, mlp_pt1, last_layer_pt1, ..."""

    def __init__(self, channels: int, config: HeadConfig, tokens: tuple[str, ...]) -> None:
        super().__init__()
        for token in tokens:
            self.add_module(f"mlp_{token}", projector(channels, config))
        for token in tokens:
            last = Prototypes(config.bottleneck, config.out_dim, norm_last_layer=config.norm_last_layer)
            self.add_module(f"last_layer_{token}", last)

    def forward(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Token name -> [..., C] in, token name -> logits [..., K] out."""
        return {token: self._head(token, values) for token, values in rows.items()}

    def _head(self, token: str, rows: Tensor) -> Tensor:
        mlp, last = self.get_submodule(f"mlp_{token}"), self.get_submodule(f"last_layer_{token}")
        logits: Tensor = last(F.normalize(mlp(rows), dim=-1))
        return logits


class MaskedHead(nn.Module):
    """iBOT's head: one MLP for CLS and patches, over the same prototypes or over two sets of them.

    Where the sets are separate, `last_layer2` scores the patches; else there is only `last_layer` (the reference's
    state dict then lists it under both names).
    """

    last_layer2: Prototypes | None

    def __init__(self, channels: int, config: HeadConfig, *, patch_out_dim: int | None) -> None:
        """`patch_out_dim`: prototypes of the patches alone; None: they share those of CLS."""
        super().__init__()
        self.mlp = projector(channels, config)
        self.last_layer = Prototypes(config.bottleneck, config.out_dim, norm_last_layer=config.norm_last_layer)
        self.last_layer2 = None
        if patch_out_dim is not None:
            self.last_layer2 = Prototypes(config.bottleneck, patch_out_dim, norm_last_layer=config.norm_last_layer)

    def forward(self, rows: Mapping[str, Tensor], *, hidden_R: Tensor | None = None) -> dict[str, Tensor]:
        """ "cls" and "patch" -> [..., C] in, -> logits [..., K] out.

        `hidden_R`: numbers of the hidden ones among all patches, [V, B, N, C]. Then "patch" are their logits alone,
        [R, K], and "patch_mean" the mean of all patches' logits, [V, B, K]: logits are linear in the unit vectors, so
        it is that of their mean, and most of a teacher's logits are never made.
        """
        last = {"cls": self.last_layer, "patch": self.last_layer2 or self.last_layer}
        unit = {token: F.normalize(self.mlp(values), dim=-1) for token, values in rows.items()}
        if hidden_R is None:
            return {token: last[token](values) for token, values in unit.items()}
        patches_VBNC = unit.pop("patch")
        mean_VBC = patches_VBNC.mean(dim=2)
        wanted = torch.cat([picked(patches_VBNC, hidden_R), mean_VBC.flatten(0, 1)])
        hidden_RK, mean_K = last["patch"](wanted).split([len(hidden_R), len(wanted) - len(hidden_R)])
        return {
            **{token: last[token](values) for token, values in unit.items()},
            "patch": hidden_RK,
            "patch_mean": mean_K.unflatten(0, mean_VBC.shape[:2]),
        }


def picked(values_VBNX: Tensor, hidden_R: Tensor) -> Tensor:
    """The rows of hidden patches, [R, X], by their numbers among all; the others are not copied."""
    patches = values_VBNX.shape[2]
    return values_VBNX.flatten(0, 1)[hidden_R // patches, hidden_R % patches]


def projector(channels: int, config: HeadConfig) -> nn.Module:
    """The MLP of a head, GELU between its layers; a single Linear when there is but one layer."""
    widths = [channels, *[config.hidden] * (config.layers - 1), config.bottleneck]
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        linear = nn.Linear(before, after)
        nn.init.trunc_normal_(linear.weight, std=config.init_std)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    layers.pop()
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
