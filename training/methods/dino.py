"""DINO on persons, the baseline (Caron et al., ICCV 2021; Luo et al., "Self-supervised pre-training for
transformer-based person re-identification", 2021; reference TransReID-SSL `dino/main_dino.py`).

Shapes: S student views, B images, C channels, K prototypes.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from datapipe.core.config import ViewConfig
from datapipe.core.settings import settings
from datapipe.views.spec import ViewSpec, multi_crop
from training.core.precision import Precision, at_least_float32, autocast_region, full_precision
from training.methods.base import Outcome, PublishedRecipe, TrainingProgress, Views, by_source
from training.methods.distillation import (
    COLOURS,
    FAMILY,
    GLOBALS,
    Distillation,
    DistillationConfig,
    PathMasks,
    TokenViews,
    forward_views,
    stacks,
)
from training.nn.heads import DinoHead
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Scored, Workload


@settings
class DinoConfig(DistillationConfig):
    """DINO: CLS of every view, large or small, learns what the teacher says of the other large one."""

    name: Literal["dino"] = "dino"
    """The method."""
    locals: int = Field(default=8, ge=0)
    """Local views, cut anywhere in the image."""


_SCRIPT = "TransReID-SSL dino/script"
_BATCH = {"optimisation.batch": 512, "optimisation.lr": 1e-3}
_COMMON = by_source("TransReID-SSL dino/main_dino.py", {
    **COLOURS, **FAMILY, "method.name": "dino", "method.locals": 8, "views.local_scale": [0.05, 0.4],
})  # fmt: skip
_DATA = "2,508,146 images of LUPerson (60 %), chosen by CFS (TransReID-SSL dino/script)"
PUBLISHED = {
    "dino_vits": PublishedRecipe(
        _COMMON | by_source(_SCRIPT, {**_BATCH, "backbone.stem": "patch", "backbone.arch": "vit_small"}), _DATA
    ),
    "dino_vitb": PublishedRecipe(
        _COMMON | by_source(_SCRIPT, {**_BATCH, "backbone.stem": "ics", "backbone.arch": "vit_base"}), _DATA
    ),
    "dino_vitl": PublishedRecipe(_COMMON | by_source(f"{_SCRIPT}, of ViT-S and ViT-B", _BATCH)),
}
"""Nothing was for ViT-L: there, what the smaller models say."""


class DinoNetwork(nn.Module):
    """Backbone without part tokens and one head, for CLS."""

    tokens = ("cls",)

    def __init__(self, config: DinoConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(backbone)
        self.head = DinoHead(self.backbone.width, config.head)

    def forward(
        self, views: Views, *, learning: bool, precision: Precision, path_masks: PathMasks = (None, None)
    ) -> TokenViews:
        """CLS of the global views, and of the local ones when learning."""
        weight_B, device = views["weight"], views["global"].device
        with autocast_region(precision, device):
            whole_GBC = forward_views(self.backbone, views["global"], weight_B, path_masks=path_masks[0]).cls
            rows = [whole_GBC]
            if learning and "local" in views:
                rows.append(forward_views(self.backbone, views["local"], weight_B, path_masks=path_masks[1]).cls)
        with full_precision(device):
            logits_SBK = self.head(at_least_float32(torch.cat(rows)))
        return TokenViews({"cls": logits_SBK}, whole_GBC)


class Dino(Distillation[DinoConfig]):
    """Self-distillation of CLS."""

    layouts = ("dino", "ics")
    published = PUBLISHED

    def __init__(self, config: DinoConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone, DinoNetwork(config, backbone))

    @staticmethod
    def views(config: DinoConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        whole = ((0.0, 1.0),) * config.locals
        return multi_crop(views, size=backbone.size, local_size=config.local_size, local_bands=whole)

    @classmethod
    def workload(cls, config: DinoConfig, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        student, teacher = stacks(config, backbone, images, locals=config.locals)
        teacher_rows = GLOBALS * images
        cls_rows = Scored((GLOBALS + config.locals) * images, teacher_rows, teacher_rows, config.head.out_dim)
        return Workload(student, teacher, config.head, (cls_rows,))

    def compare(self, student: TokenViews, teacher: TokenViews, views: Views, progress: TrainingProgress) -> Outcome:
        """The mean over pairs of a global view and another view, image by image: 18 with 2 globals and 8 locals."""
        output = self.distil(student, teacher, views["weight"], progress.epoch)
        return self.flat_mean(output, views["weight"], self.metrics(output, views["weight"], progress))
