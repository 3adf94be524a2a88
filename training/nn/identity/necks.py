"""Batch norm in front of the comparison of features ("necks") as unsupervised ReID has it: by groups of a batch.

TransReID-SSL and PASS train on several GPUs with torch's DataParallel: every GPU normalises its contiguous slice of the
batch with that slice's own statistics, and the running statistics are those of the first (PASS
`PASS_cluster_contrast_reid/clustercontrast/models/vision_transformer.py` TransReID.forward).

Shapes: B images of this process, C channels of a token, P part tokens, F channels of the feature.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.core.precision import at_least_float32
from training.nn.ics_stem import EPS, PooledBatchNorm
from training.nn.identity.fusion import FEATURES, Fusion, fused, fused_tokens, fused_width
from training.nn.vision_transformer import BackboneConfig, VisionTransformer

FEATURE = "neck"
"""Name of the feature behind the necks among those that are scored; it is ranked as it is, not normalised again."""


class GroupedBatchNorm(PooledBatchNorm):
    """Batch norm of features [B, C] whose bias stays 0, with the statistics of each group of `group` neighbours.

    B must be whole groups. `group` 0: one group of all real images of all ranks. What moves the running statistics are
    those of the first group of the global batch; see `PooledBatchNorm` for how they travel.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__(channels)
        self.group = group
        self.bias.requires_grad_(False)

    def forward(self, values_BC: Tensor, real_B: Tensor | None) -> Tensor:
        if not self.group or not self.training:
            return super().forward(values_BC[:, :, None, None], real_B)[:, :, 0, 0]
        if len(values_BC) % self.group:
            raise ValueError(f"{len(values_BC)} images are not whole groups of {self.group}")
        groups_GSC = values_BC.unflatten(0, (-1, self.group))
        variance_GC, mean_GC = torch.var_mean(groups_GSC, dim=1, correction=0)
        unbiased_C = variance_GC[0] * self.group / max(self.group - 1, 1)
        self.fresh.append(torch.stack([mean_GC[0], unbiased_C]).detach())
        normal_GSC = (groups_GSC - mean_GC[:, None]) * torch.rsqrt(variance_GC + EPS)[:, None]
        return (normal_GSC * self.weight + self.bias).flatten(0, 1)


class NeckedBackbone(nn.Module):
    """A backbone with its necks, as it is scored and as its images are clustered."""

    def __init__(self, backbone: VisionTransformer, necks: "TokenNecks") -> None:
        super().__init__()
        self.backbone, self.necks = backbone, necks

    @property
    def config(self) -> BackboneConfig:
        """Settings of the backbone."""
        return self.backbone.config

    @property
    def parts(self) -> int:
        """Part tokens of the backbone."""
        return self.backbone.parts

    def feature_widths(self) -> dict[str, int]:
        """Channels of each of `named_features`."""
        widths = {FEATURE: self.necks.channels, "cls": self.backbone.width}
        return widths | ({FEATURES["cat"]: 2 * self.backbone.width} if self.parts else {})

    def named_features(self, images_BIHW: Tensor) -> dict[str, Tensor]:
        """ "neck" [B, F], behind the necks; "cls" [B, C]; with parts "cls+parts" [B, 2C]."""
        seen = self.backbone(images_BIHW)
        cls_BC, parts_BPC = at_least_float32(seen.cls), at_least_float32(seen.parts)
        features = {FEATURE: self.necks(cls_BC, parts_BPC), "cls": cls_BC}
        if parts_BPC.shape[1]:
            features[FEATURES["cat"]] = fused_tokens(cls_BC, parts_BPC, "cat")
        return features


class TokenNecks(nn.Module):
    """From CLS and part tokens to the feature that is clustered, remembered, trained and evaluated.

    | neck   | fusion | feature                                          | F  | norm        |
    |--------|--------|--------------------------------------------------|----|-------------|
    | "one"  | "cat"  | L2(BN([CLS ; mean_i P_i]))                       | 2C | 1           |
    | "one"  | "mean" | L2(BN((CLS + mean_i P_i) / 2))                   | C  | 1           |
    | "each" | "cat"  | [L2(BN_0 CLS) ; mean_i L2(BN_i P_i)]             | 2C | 1 .. sqrt 2 |
    | "each" | "mean" | (L2(BN_0 CLS) + mean_i L2(BN_i P_i)) / 2         | C  | at most 1   |

    Without part tokens it is L2(BN(CLS)). Parameters have the names of the reference's state dicts.
    """

    def __init__(self, width: int, parts: int, *, fusion: Fusion, neck: Literal["one", "each"], group: int) -> None:
        super().__init__()
        self.parts, self.fusion, self.neck = parts, fusion, neck
        self.channels = fused_width(width, parts, fusion)
        self.bottleneck = GroupedBatchNorm(self.channels if neck == "one" else width, group)
        if neck == "each":
            for part in range(1, parts + 1):
                self.add_module(f"bottleneck_pt{part}", GroupedBatchNorm(width, group))

    def forward(self, cls_BC: Tensor, parts_BPC: Tensor, real_B: Tensor | None = None) -> Tensor:
        """[B, F]."""
        if not self.parts or self.neck == "one":
            return F.normalize(self.bottleneck(fused_tokens(cls_BC, parts_BPC, self.fusion), real_B), dim=1)
        necks = [self.get_submodule(f"bottleneck_pt{part}") for part in range(1, self.parts + 1)]
        parts = [F.normalize(neck(part_BC, real_B), dim=1)
                 for neck, part_BC in zip(necks, parts_BPC.unbind(dim=1), strict=True)]  # fmt: skip
        unit_BC = F.normalize(self.bottleneck(cls_BC, real_B), dim=1)
        return fused(unit_BC, torch.stack(parts).mean(dim=0), self.fusion)
