"""PASS: part-aware self-supervised pre-training (Zhu et al., ECCV 2022; reference `PASS/main_pass.py`).

Shapes: G = 2 global views, L local views, S = student views of a token, B images, C channels, P part tokens,
K prototypes, M pairs of different views.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from datapipe.core.config import Range, ViewConfig
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
    StudentTeacherOutput,
    TokenViews,
    forward_views,
    stacks,
)
from training.nn.distillation_losses import entropy
from training.nn.feature_diagnostics import information
from training.nn.heads import TokenHeads
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Scored, Workload


@settings
class PassConfig(DistillationConfig):
    """PASS: a part token for each of several overlapping horizontal bands learns from crops of its own band. CLS and
    each part token have a head of their own."""

    name: Literal["pass"] = "pass"
    """The method."""
    parts: int = Field(default=3, ge=1)
    """P, number of bands and of part tokens."""
    part_overlap: float = Field(default=0.5, ge=0, lt=1)
    """Share of its height that a band has in common with the next one. All bands are equally high and together cover
    the image: 3 bands at 0.5 are half the height each, starting at 0, 1/4 and 1/2."""
    locals_per_part: int = Field(default=3, ge=1)
    """Local views cut from each band."""

    @property
    def bands(self) -> tuple[Range, ...]:
        """(top, bottom) of each band as shares of the height."""
        stride = 1 - self.part_overlap
        height = 1 / (1 + (self.parts - 1) * stride)
        return tuple((part * stride * height, min(part * stride * height + height, 1.0)) for part in range(self.parts))

    @property
    def areas(self) -> list[int]:
        """The part, 1-based, that each local view belongs to: 1, 1, 1, 2, 2, 2, ..."""
        return [part for part in range(1, self.parts + 1) for _ in range(self.locals_per_part)]


_SCRIPTS = "PASS scripts"
_COMMON = by_source("PASS main_pass.py", {
    **COLOURS, **FAMILY, "method.name": "pass", "method.parts": 3, "method.part_overlap": 0.5,
    "backbone.stem": "patch",
}) | by_source(_SCRIPTS, {"method.locals_per_part": 3, "views.local_scale": [0.1, 0.8]})  # fmt: skip
_BASE = {"optimisation.batch": 512, "optimisation.lr": 1e-3}
_DATA = "all 4,180,243 images of LUPerson (PASS scripts)"
PUBLISHED = {
    "pass_vits": PublishedRecipe(_COMMON | by_source(_SCRIPTS, {
        "backbone.arch": "vit_small", "optimisation.batch": 1_024, "optimisation.lr": 2e-3}), _DATA),
    "pass_vitb": PublishedRecipe(_COMMON | by_source(_SCRIPTS, {"backbone.arch": "vit_base", **_BASE}), _DATA),
    "pass_vitl": PublishedRecipe(_COMMON | by_source(f"{_SCRIPTS}, of ViT-B", _BASE)),
}  # fmt: skip
"""Nothing was for ViT-L: there, what ViT-B's say."""


class PassNetwork(nn.Module):
    """Backbone with P part tokens and a head per token, nothing shared."""

    def __init__(self, config: PassConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.tokens = ("cls", *(f"pt{part}" for part in range(1, config.parts + 1)))
        self.areas = config.areas
        self.backbone = VisionTransformer(backbone, parts=config.parts)
        self.head = TokenHeads(self.backbone.width, config.head, self.tokens)

    def forward(
        self, views: Views, *, learning: bool, precision: Precision, path_masks: PathMasks = (None, None)
    ) -> TokenViews:
        """Globals carry CLS and all parts, a local CLS and the part of its band."""
        weight_B, device = views["weight"], views["global"].device
        with autocast_region(precision, device):
            whole = forward_views(self.backbone, views["global"], weight_B, part="all", path_masks=path_masks[0])
            rows = {"cls": [whole.cls]}
            rows |= {token: [whole.parts[:, :, part]] for part, token in enumerate(self.tokens[1:])}
            if learning:
                near = forward_views(self.backbone, views["local"], weight_B, part=self.areas, path_masks=path_masks[1])
                rows["cls"].append(near.cls)
                by_area = near.parts[:, :, 0].chunk(len(self.tokens) - 1)
                for token, part_rows in zip(self.tokens[1:], by_area, strict=True):
                    rows[token].append(part_rows)
        with full_precision(device):
            logits = self.head({token: at_least_float32(torch.cat(stacks)) for token, stacks in rows.items()})
        return TokenViews(logits, whole.cls)


class Pass(Distillation[PassConfig]):
    """Self-distillation of CLS over all views and of each part token over globals and the locals of its band."""

    layouts = ("pass",)
    published = PUBLISHED

    def __init__(self, config: PassConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone, PassNetwork(config, backbone))

    @staticmethod
    def views(config: PassConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        bands = tuple(config.bands[area - 1] for area in config.areas)
        return multi_crop(views, size=backbone.size, local_size=config.local_size, local_bands=bands)

    @staticmethod
    def parts(config: PassConfig) -> int:
        return config.parts

    @classmethod
    def workload(cls, config: PassConfig, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        """A local view has the part token of its own band alone."""
        local = len(config.areas)
        student, teacher = stacks(config, backbone, images, locals=local, parts=config.parts, near=1)
        teacher_rows, prototypes = GLOBALS * images, config.head.out_dim
        cls_rows = Scored((GLOBALS + local) * images, teacher_rows, teacher_rows, prototypes)
        part_rows = Scored((GLOBALS + config.locals_per_part) * images, teacher_rows, teacher_rows, prototypes)
        return Workload(student, teacher, config.head, (cls_rows, *[part_rows] * config.parts))

    def compare(self, student: TokenViews, teacher: TokenViews, views: Views, progress: TrainingProgress) -> Outcome:
        """One flat mean over the pairs of all tokens, image by image:

            loss[b] = (sum over pairs of CLS + sum over parts i, pairs of P_i) H / (number of all pairs)

        With 2 globals, 3 parts and 3 locals each: 20 + 3 * 8 = 44 terms.
        """
        output = self.distil(student, teacher, views["weight"], progress.epoch)
        return self.flat_mean(output, views["weight"], self.metrics(output, views["weight"], progress))

    @torch.no_grad()
    def metrics(self, output: StudentTeacherOutput, weight_B: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        """Metrics of the CLS token, and means over those of the part tokens."""
        parts, looked = self.student.tokens[1:], {}
        if self.looks_at_targets(progress):
            targets = [output.targets[part] for part in parts]
            looked = {
                "target_entropy_part": torch.stack([entropy(rows).mean(dim=0) for rows in targets]).mean(dim=0),
                "target_information_part": torch.stack([information(rows, weight_B) for rows in targets]).mean(dim=0),
            }
        return {
            **super().metrics(output, weight_B, progress),
            "loss_part": torch.cat([output.pairs[part] for part in parts]).detach().mean(dim=0),
            **looked,
        }
