"""PersonViT: DINO on CLS and masked image modelling on patches (Hu et al., "PersonViT: large-scale self-supervised
vision transformer for person re-identification", 2024), as its ancestor iBOT does both (Zhou et al., ICLR 2022;
reference iBOT `main_ibot.py`, `models/vision_transformer.py`).

PersonViT's pre-training code is not public. What its paper leaves open is iBOT's choice here, on rectangles, with the
position tables of TransReID-SSL; every such choice is a field of `PersonVitConfig` that says so.

Shapes: G = 2 global views, S student views of CLS, B images, N patches, R hidden patches of all views and images,
C channels, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from datapipe.core.config import ViewConfig
from datapipe.core.settings import settings
from datapipe.views.masking import MaskConfig, MaskSpec
from datapipe.views.spec import ViewSpec, multi_crop
from training.core.precision import Precision, at_least_float32, autocast_region, full_precision
from training.core.schedules import teacher_temperature
from training.methods.base import Outcome, PublishedRecipe, TrainingProgress, Views, by_source
from training.methods.distillation import (
    GLOBALS,
    Distillation,
    DistillationConfig,
    PathMasks,
    TokenViews,
    forward_views,
    stacks,
)
from training.nn.distillation_losses import entropy, hidden_numbers, hidden_patch_cross_entropies, mean_over_hidden
from training.nn.feature_diagnostics import information
from training.nn.heads import HeadConfig, MaskedHead, picked
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Scored, Workload


@settings
class PersonVitConfig(DistillationConfig):
    """PersonViT: the student sees global views with patches hidden. CLS learns as in DINO; at each hidden patch it
    learns what the teacher, who sees all, says of that patch of the same view."""

    name: Literal["personvit"] = "personvit"
    """The method."""
    locals: int = Field(default=8, ge=0)
    """Local views, never masked. The "n8" in the name of the published run may mean these; iBOT: 10."""
    head: HeadConfig = HeadConfig(out_dim=8_192, norm_last_layer=False)
    """Shape of the head. Unknown for PersonViT: 8192 prototypes fit the size of its published checkpoint and are
    iBOT's, whose prototypes learn their length too."""
    patch_head: Literal["shared", "separate", "student_only"] = "shared"
    """Prototypes of the patches. "shared": those of CLS (iBOT's README). "separate": their own. "student_only": the
    student's own, while the teacher scores patches with those of CLS, as the defaults of iBOT's parser have it."""
    patch_out_dim: int = Field(default=8_192, ge=2)
    """Number of the patches' own prototypes. Only with patch_head = "separate"; else there are head.out_dim."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax for CLS in the first epoch (iBOT)."""
    teacher_temp: float = Field(default=0.07, gt=0)
    """Teacher temperature after the warm-up (iBOT)."""
    warmup_teacher_patch_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax for patches in the first epoch (iBOT)."""
    teacher_patch_temp: float = Field(default=0.07, gt=0)
    """Teacher temperature of patches after the warm-up (iBOT)."""
    teacher_temp_warmup_epochs: int = Field(default=30, ge=0)
    """Epochs over which both temperatures change linearly (iBOT)."""
    patch_centre_momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of the patches' old centre that stays at each step (centring only)."""
    lambda_dino: float = Field(default=1.0, ge=0)
    """Factor of the CLS term; lambda 1 of the paper."""
    lambda_mim: float = Field(default=1.0, ge=0)
    """Factor of the patch term; lambda 2 of the paper."""
    mask: MaskConfig = MaskConfig()
    """What is hidden. Unknown for PersonViT; the default is iBOT's: half of the global views whole, of the others .1 to
    .5, in blocks. A view without hidden patches counts in the mean, so the patch term is about half as strong."""


_README = "PersonViT README"
_COMMON = (
    by_source(_README, {
        "method.name": "personvit", "backbone.size": [256, 128], "backbone.patch": 16, "backbone.stem": "patch",
    })
    | by_source("PersonViT run_epochs_300.sh", {"optimisation.epochs": 300.0})
    | by_source("name of the released weights: wopt, ar.375", {
        "views.global_ratio": [0.375, 0.667], "init.weights": "",
    })
    | by_source("iBOT main_ibot.py; PersonViT's own is not public", {"optimisation.precision": "fp16"})
)  # fmt: skip
_DATA = "all 4,180,243 images of LUPerson (name of the released weights: lup)"
PUBLISHED = {
    "personvit_vits": PublishedRecipe(_COMMON | by_source(_README, {"backbone.arch": "vit_small"}), _DATA),
    "personvit_vitb": PublishedRecipe(_COMMON | by_source(_README, {"backbone.arch": "vit_base"}), _DATA),
    "personvit_vitl": PublishedRecipe(_COMMON),
}
"""Nothing was for ViT-L: there, what holds of the smaller models."""


class MaskedViews(NamedTuple):
    """What a network says of CLS and of patches."""

    tokens: TokenViews
    patches: Tensor
    """Logits of the hidden patches, [R, K], in the order of the mask."""
    mean: Tensor | None
    """Teacher: mean logits of all patches of a view, [G, B, K]. Student: None."""


class PersonVitNetwork(nn.Module):
    """Backbone and one MLP for CLS and patches; in the student also a mask token."""

    tokens = ("cls", "patch")

    def __init__(self, config: PersonVitConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        own = {"shared": None, "separate": config.patch_out_dim, "student_only": config.head.out_dim}
        self.backbone = VisionTransformer(backbone, maskable=True)
        self.head = MaskedHead(self.backbone.width, config.head, patch_out_dim=own[config.patch_head])

    def forward(
        self, views: Views, *, learning: bool, precision: Precision, path_masks: PathMasks = (None, None)
    ) -> MaskedViews:
        """Global views, masked when learning; then also CLS of the local views, whole."""
        weight_B, device = views["weight"], views["global"].device
        mask_GBN = views["mask"].flatten(2)
        with autocast_region(precision, device):
            mask = mask_GBN.flatten(0, 1) if learning else None
            whole = forward_views(self.backbone, views["global"], weight_B, path_masks=path_masks[0], mask=mask)
            rows = [whole.cls]
            if learning and "local" in views:
                rows.append(forward_views(self.backbone, views["local"], weight_B, path_masks=path_masks[1]).cls)
        with full_precision(device):
            hidden_R = _hidden(views)
            patches = picked(whole.patches, hidden_R) if learning else whole.patches
            rows_of = {"cls": at_least_float32(torch.cat(rows)), "patch": at_least_float32(patches)}
            logits = self.head(rows_of, hidden_R=None if learning else hidden_R)
        return MaskedViews(TokenViews({"cls": logits["cls"]}, whole.cls), logits["patch"], logits.get("patch_mean"))


class PersonVit(Distillation[PersonVitConfig]):
    """Self-distillation of CLS, and of hidden patches from the same view."""

    layouts = ("personvit",)
    published = PUBLISHED

    def __init__(self, config: PersonVitConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone, PersonVitNetwork(config, backbone))
        self.teacher.backbone.masked_embed = None  # it never sees a mask
        if config.patch_head == "student_only":
            self.teacher.head.last_layer2 = None

    @staticmethod
    def views(config: PersonVitConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        whole = ((0.0, 1.0),) * config.locals
        spec = multi_crop(views, size=backbone.size, local_size=config.local_size, local_bands=whole)
        return replace(spec, masks=(MaskSpec(backbone.grid, config.mask),) * 2)

    @classmethod
    def workload(cls, config: PersonVitConfig, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        """What a micro-batch is to the networks; as many patches of a global view are hidden as on average."""
        student, teacher = stacks(config, backbone, images, locals=config.locals)
        teacher_rows, patches, ratios = GLOBALS * images, math.prod(backbone.grid), config.mask.ratios
        hidden = round(teacher_rows * patches * sum(ratios) / len(ratios))
        own = config.patch_out_dim if config.patch_head == "separate" else config.head.out_dim
        cls_rows = Scored((GLOBALS + config.locals) * images, teacher_rows, teacher_rows, config.head.out_dim)
        patch_rows = Scored(hidden, hidden, hidden + teacher_rows, own, teacher_mlp=teacher_rows * patches)
        return Workload(student, teacher, config.head, (cls_rows, patch_rows))

    def prototypes(self, token: str) -> int:
        separate = token == "patch" and self.config.patch_head == "separate"
        return self.config.patch_out_dim if separate else self.config.head.out_dim

    def centre_momentum(self, token: str) -> float:
        return self.config.patch_centre_momentum if token == "patch" else self.config.centre_momentum

    def temperature(self, token: str, epoch: int) -> float:
        if token == "cls":
            return super().temperature(token, epoch)
        return teacher_temperature(
            epoch,
            warmup=self.config.warmup_teacher_patch_temp,
            final=self.config.teacher_patch_temp,
            warmup_epochs=self.config.teacher_temp_warmup_epochs,
        )

    def compare(self, student: MaskedViews, teacher: MaskedViews, views: Views, progress: TrainingProgress) -> Outcome:
        """lambda_dino * mean over pairs of different views + lambda_mim * the patch term, image by image."""
        weight_B, mask_GBN = views["weight"], views["mask"].flatten(2)
        output = self.distil(student.tokens, teacher.tokens, weight_B, progress.epoch)
        hidden_R = _hidden(views)
        targets_RK = self._patch_targets(teacher.patches, progress.epoch)
        patch_B = hidden_patch_cross_entropies(
            student.patches, targets_RK, mask_GBN, student_temp=self.config.student_temp, hidden_R=hidden_R
        )
        loss_B = self.config.lambda_dino * output.pairs["cls"].mean(dim=0) + self.config.lambda_mim * patch_B
        metrics = self.metrics(output, weight_B, progress)
        metrics |= self._patch_metrics(patch_B, targets_RK, mask_GBN, hidden_R, looks=self.looks_at_targets(progress))
        # the patches' centre follows all of them, hidden or not
        assert teacher.mean is not None
        taught_TBK: Mapping[str, Tensor] = {**teacher.tokens.logits, "patch": teacher.mean}
        return self.outcome(loss_B, weight_B, taught_TBK, metrics)

    def _patch_targets(self, taught_RK: Tensor, epoch: int) -> Tensor:
        """Probabilities for the hidden patches, [R, K]. Sinkhorn: equal use of the prototypes over those alone."""
        return self.targets_of("patch", taught_RK[None], taught_RK.new_ones(len(taught_RK)), epoch)[0]

    @torch.no_grad()
    def _patch_metrics(
        self, patch_B: Tensor, targets_RK: Tensor, mask_GBN: Tensor, hidden_R: Tensor, *, looks: bool
    ) -> dict[str, Tensor]:
        """The patch term, the share of hidden patches, and, where it `looks`, what their targets are watched by.

        target_entropy_patch: an image without hidden patches has the micro-batch's mean, so that the mean over images
            is one over hidden patches; uniform_entropy_patch is its ceiling
        target_information_patch: of which hidden patch of the micro-batch they are for, the same for each image
        """
        ceiling = patch_B.new_full((), math.log(self.prototypes("patch"))).expand_as(patch_B)
        found = {
            "loss_patch": patch_B.detach(),
            "hidden": mask_GBN.to(patch_B.dtype).mean(dim=(0, 2)),
            "uniform_entropy_patch": ceiling,
        }
        if not looks:
            return found
        unsure_R = entropy(targets_RK)
        hidden_B = mask_GBN.sum(dim=-1).clamp(max=1).sum(dim=0)  # views with hidden patches
        own_B = mean_over_hidden(unsure_R, mask_GBN, hidden_R) * len(mask_GBN) / hidden_B.clamp(min=1)
        mean = unsure_R.sum() / max(len(unsure_R), 1)
        known_R = information(targets_RK[None], targets_RK.new_ones(len(targets_RK)))
        return found | {
            "target_entropy_patch": torch.where(hidden_B > 0, own_B, mean),
            "target_information_patch": (known_R.sum() / max(len(known_R), 1)).expand_as(patch_B),
        }


def _hidden(views: Views) -> Tensor:
    """Numbers of the hidden patches among those of all views and images: the loader's, or counted from the mask."""
    return views["hidden"] if "hidden" in views else hidden_numbers(views["mask"])
