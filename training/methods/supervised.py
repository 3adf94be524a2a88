"""Supervised fine-tuning on identities: the published one of TransReID, TransReID-SSL, PASS and PersonViT
(`processor.py` do_train, `make_model.py`, `make_loss.py`), and the one for masked autoencoders (HAP
`downstream_tasks/person_reid`).

A batch is P identities with K images each. The loss is the cross-entropy of an identity classifier behind a batch norm
(the "BNNeck", whose bias is frozen at 0), plus a triplet loss with hard mining on the feature in front of it. Mining
and batch statistics go over the real images of all ranks.

Shapes: B images of this process, N of all ranks, H x W pixels, C channels of a token, P part tokens, F channels of the
feature, K identities.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings
from datapipe.views.spec import ViewSpec, padded
from training.core.collectives import gathered
from training.core.precision import Precision, at_least_float32, autocast_region, full_precision
from training.methods.base import (
    ByIdentity,
    Method,
    MethodSettings,
    Outcome,
    PublishedRecipe,
    Role,
    TrainingProgress,
    Views,
    by_source,
)
from training.methods.identity_batch import erased_numbers, identity_batch
from training.nn import ics_stem
from training.nn.drop_path import Paths
from training.nn.feature_diagnostics import of_features
from training.nn.identity import reid_losses
from training.nn.identity.fusion import Fusion, fused_tokens, fused_width
from training.nn.identity.necks import GroupedBatchNorm
from training.nn.identity.random_erasing import NOISE
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Workload


@settings
class SupervisedConfig(MethodSettings):
    """Fine-tuning on identities. Of the settings under `views` only `flip`, `interpolation` and `statistics` apply."""

    name: Literal["supervised"] = "supervised"
    """The method."""
    instances: int = Field(default=4, ge=1)
    """Images of each identity in a batch, K; `optimisation.batch` must be a multiple of it."""
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training identities that is used, drawn by the seed; those of a smaller share are among those of a
    larger one."""
    classes: int = Field(default=0, ge=0)
    """Training identities. 0: counted when the run starts."""
    parts: int = Field(default=0, ge=0)
    """Part tokens of the backbone. With parts the feature is CLS and their mean, see `fusion`; without, CLS."""
    fusion: Fusion = "cat"
    """With parts: "cat" the feature is [CLS ; mean of the parts], as in PASS's tables; "mean" (CLS + mean of the
    parts) / 2, as in the weights that its adaptation from Market-1501 to MSMT17 starts from."""
    neck: Literal["one", "each", "none"] = "one"
    """Batch norm in front of the classifier. "one": of the feature; "each": CLS and every part have their own (PASS's
    multi-neck); "none" (HAP)."""
    identity_weight: float = Field(default=1.0, ge=0)
    """Factor of the classifier's loss."""
    triplet_weight: float = Field(default=1.0, ge=0)
    """Factor of the triplet loss."""
    margin: float = Field(default=0.0, ge=0)
    """Margin of the triplet loss. 0: the soft margin, as published."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the classifier's loss."""
    pad: int = Field(default=10, ge=0)
    """Black pixels around the resized image before it is cut at random."""
    erase: float = Field(default=0.5, ge=0, le=1)
    """Share of images with a rectangle of noise."""
    decay: Literal["all", "weights"] = "all"
    """What weight decay applies to: everything, as published, or what has two or more dimensions but for tokens and
    positions (HAP)."""
    bias_lr_factor: float = Field(default=2.0, gt=0)
    """Learning rate of biases over that of all else."""

    @model_validator(mode="after")
    def _fits(self) -> "SupervisedConfig":
        if self.fusion == "mean" and not self.parts:
            raise ValueError('fusion = "mean" needs part tokens, and there are none: parts = 0')
        return self


_CONFIGS = "TransReID-SSL, PASS, PersonViT transreid configs"
_COMMON = {
    "views.flip": 0.5,
    "views.interpolation": "bicubic",
    "backbone.drop_path": 0.1,
    "method.name": "supervised",
    "method.label_fraction": 1.0,
    "method.margin": 0.0,
    "method.smoothing": 0.0,
    "method.pad": 10,
    "method.erase": 0.5,
    "optimisation.batch": 64,
    "optimisation.clip": "none",
    "optimisation.precision": "fp16",
}
"""What TransReID's family and HAP have in common."""

_TRANSREID = by_source(_CONFIGS, {
    **_COMMON,
    "views.statistics": "half",
    "init.positions": "bilinear",
    "evaluation.quote": "last",
    "evaluation.interpolation": "bilinear",
    "method.instances": 4,
    "method.neck": "one",
    "method.identity_weight": 1.0,
    "method.triplet_weight": 1.0,
    "method.decay": "all",
    "method.bias_lr_factor": 2.0,
    "optimisation.optimizer": "sgd",
    "optimisation.momentum": 0.9,
    "optimisation.schedule": "epoch",
    "optimisation.epochs": 120.0,
    "optimisation.lr": 4e-4,
    "optimisation.warmup_lr": 4e-6,
    "optimisation.final_lr": 8e-7,
    "optimisation.warmup_epochs": 20.0,
    "optimisation.weight_decay": 1e-4,
    "optimisation.final_weight_decay": 1e-4,
    "optimisation.layer_decay": 1.0,
})  # fmt: skip

_MASKED = by_source("HAP downstream_tasks/person_reid; PersonMAE's own is not public", {
    **_COMMON,
    "views.statistics": "imagenet",
    "backbone.size": [256, 128],
    "init.positions": "bicubic",
    "evaluation.interpolation": "bicubic",
    "method.instances": 8,
    "method.neck": "none",
    "method.identity_weight": 0.5,
    "method.triplet_weight": 0.5,
    "method.decay": "weights",
    "method.bias_lr_factor": 1.0,
    "optimisation.optimizer": "adamw",
    "optimisation.betas": [0.9, 0.999],
    "optimisation.schedule": "step",
    "optimisation.epochs": 100.0,
    "optimisation.lr": 8e-3,
    "optimisation.warmup_lr": 0.0,
    "optimisation.final_lr": 0.0,
    "optimisation.warmup_epochs": 5.0,
    "optimisation.weight_decay": 0.05,
    "optimisation.final_weight_decay": 0.05,
    "optimisation.layer_decay": 0.4,
})  # fmt: skip
_AT_256 = _TRANSREID | by_source(_CONFIGS, {"backbone.size": [256, 128]})
PUBLISHED = {
    "supervised": PublishedRecipe(_AT_256),
    "supervised_384": PublishedRecipe(_TRANSREID | by_source(_CONFIGS, {"backbone.size": [384, 128]})),
    "supervised_pass": PublishedRecipe(_AT_256 | by_source(
        "PASS make_model.py, number of keys in its fine-tuned weights",
        {"method.parts": 3, "method.fusion": "cat", "method.neck": "each"})),
    "supervised_mae": PublishedRecipe(_MASKED),
}  # fmt: skip


class FineTuningOutput(NamedTuple):
    """What the network makes of images."""

    feature_BF: Tensor
    """In front of the neck: what the triplet loss compares and retrieval ranks by."""
    logits_BK: Tensor


class IdentityHead(nn.Module):
    """Necks and classifier, under the names of the reference's state dicts."""

    def __init__(self, config: SupervisedConfig, width: int) -> None:
        super().__init__()
        self.neck, self.fusion = config.neck, config.fusion
        channels = fused_width(width, config.parts, config.fusion)
        if config.neck != "none":
            self.bottleneck = GroupedBatchNorm(channels if config.neck == "one" else width, group=0)
        if config.neck == "each":
            for part in range(1, config.parts + 1):
                self.add_module(f"bottleneck_{part}", GroupedBatchNorm(width, group=0))
        self.classifier = nn.Linear(channels, config.classes, bias=config.neck == "none")
        nn.init.normal_(self.classifier.weight, std=0.02 if config.neck == "none" else 0.001)

    def forward(self, cls_BC: Tensor, parts_BPC: Tensor, real_B: Tensor) -> FineTuningOutput:
        feature_BF = fused_tokens(cls_BC, parts_BPC, self.fusion)
        return FineTuningOutput(feature_BF, self.classifier(self._normed(feature_BF, cls_BC, parts_BPC, real_B)))

    def _normed(self, feature_BF: Tensor, cls_BC: Tensor, parts_BPC: Tensor, real_B: Tensor) -> Tensor:
        if self.neck == "none":
            return feature_BF
        if self.neck == "one":
            return self.bottleneck(feature_BF, real_B)
        necks = [self.get_submodule(f"bottleneck_{part}") for part in range(1, parts_BPC.shape[1] + 1)]
        parts = [neck(part_BC, real_B) for neck, part_BC in zip(necks, parts_BPC.unbind(dim=1), strict=True)]
        normal_BPC = torch.stack(parts, dim=1) if parts else parts_BPC
        return fused_tokens(self.bottleneck(cls_BC, real_B), normal_BPC, self.fusion)


class SupervisedStudent(nn.Module):
    """Backbone and head."""

    def __init__(self, config: SupervisedConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(backbone, parts=config.parts)
        self.head = IdentityHead(config, self.backbone.width)

    def forward(
        self, images_BIHW: Tensor, real_B: Tensor, *, precision: Precision, path_masks: Paths
    ) -> FineTuningOutput:
        with autocast_region(precision, images_BIHW.device):
            seen = self.backbone(images_BIHW, path_masks=path_masks, real=real_B)
        with full_precision(images_BIHW.device):
            return self.head(at_least_float32(seen.cls), at_least_float32(seen.parts), real_B)


class Supervised(Method[SupervisedConfig]):
    """Identity classification and metric learning."""

    student: SupervisedStudent
    fine_tunes = True
    task = "supervised"
    published = PUBLISHED

    def __init__(self, config: SupervisedConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone)
        self.student = SupervisedStudent(config, backbone)

    @staticmethod
    def views(config: SupervisedConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        spec = padded(views, size=backbone.size, pad=config.pad)
        return replace(spec, erasing=NOISE.spec(backbone.size, config.erase))

    @staticmethod
    def by_identity(config: SupervisedConfig) -> ByIdentity:
        return ByIdentity(config.instances, config.label_fraction)

    @staticmethod
    def for_identities(config: SupervisedConfig, count: int) -> SupervisedConfig:
        if config.classes not in (0, count):
            raise ConfigError(f"the recipe is for {config.classes} identities, the data has {count}",
                              where="method.classes", hint="0: as many as there are")  # fmt: skip
        return replace(config, classes=count)

    @staticmethod
    def parts(config: SupervisedConfig) -> int:
        return config.parts

    @staticmethod
    def fusion(config: SupervisedConfig) -> Fusion:
        return config.fusion

    @staticmethod
    def for_weights(config: SupervisedConfig, parts: int) -> SupervisedConfig:
        """Without part tokens there is nothing to put together: the recipe's `fusion` is dropped, as is a neck for
        each."""
        if parts:
            return replace(config, parts=parts)
        return replace(config, parts=0, fusion="cat", neck="one" if config.neck == "each" else config.neck)

    @classmethod
    def workload(cls, config: SupervisedConfig, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        """There is no teacher; classifier and distances are less than 1e-3 of the products."""
        erased = erased_numbers(backbone, images, config.erase)
        return super().workload(config, views, backbone, images)._replace(loss_alive=erased, products_complete=True)

    @classmethod
    def nearest_recipe(cls, run: Mapping[str, Any]) -> str:
        """The one for such weights and such a size."""
        if run["optimisation.optimizer"] == "adamw":
            return "supervised_mae"
        if run["method.parts"]:
            return "supervised_pass"
        return "supervised_384" if run["backbone.size"] == [384, 128] else "supervised"

    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """loss[b] = identity_weight * cross-entropy[b] + triplet_weight * triplet[b]

        Recorded of each image: both losses, ln K as the former's value at chance, whether the classifier is right.
        """
        weight_B = views["weight"]
        images_BIHW, label_B, real_B, path_masks = identity_batch(
            views,
            progress,
            backbone=self.student.backbone,
            erasing=NOISE,
            probability=self.config.erase,
        )
        output = self.student(images_BIHW, real_B, precision=self.precision, path_masks=path_masks)
        with full_precision(weight_B.device):
            identity_B, triplet_B = self._losses(output, label_B)
            loss_B = self.config.identity_weight * identity_B + self.config.triplet_weight * triplet_B
            weight_B = weight_B.to(loss_B.dtype)
            metrics = {
                "loss_identity": identity_B.detach(),
                "loss_triplet": triplet_B.detach(),
                "uniform_entropy_identity": torch.full_like(triplet_B, math.log(self.config.classes)).detach(),
                "identified": (output.logits_BK.argmax(dim=1) == label_B).to(loss_B.dtype),
                **of_features(output.feature_BF.detach(), weight_B),
            }
            return Outcome((weight_B * loss_B).sum(), ics_stem.take_statistics(self, weight_B.sum()), metrics)

    def after_step(self, sums: dict[str, Tensor], progress: TrainingProgress) -> None:
        ics_stem.settle(self, sums)

    def roles(self) -> dict[str, Role]:
        return {name: self._role(name, value) for name, value in self.named_parameters() if value.requires_grad}

    def backbone(self) -> VisionTransformer:
        return self.student.backbone

    def extra_exports(self) -> dict[str, dict[str, Tensor]]:
        """The whole of it, as the references save it."""
        return {"fine_tuned.safetensors": to_transreid(self)}

    def couples_batch(self) -> bool:
        """Mining and batch norm do."""
        return True

    def _losses(self, output: FineTuningOutput, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the classifier and of the triplets: [B] both; 0 for an image of unknown identity."""
        features_NF, label_N = gathered(output.feature_BF), gathered(label_B)
        far = reid_losses.distances(output.feature_BF, features_NF)
        positive_B, negative_B = reid_losses.hardest(far, label_B, label_N)
        triplet_B = reid_losses.triplet(positive_B, negative_B, self.config.margin) * (label_B >= 0)
        return reid_losses.identity(output.logits_BK, label_B, smoothing=self.config.smoothing), triplet_B

    def _role(self, name: str, parameter: nn.Parameter) -> Role:
        network, _, rest = name.removeprefix("student.").partition(".")
        backbone = self.student.backbone
        table = "." not in rest  # tokens and positions are the backbone's own parameters
        return Role(
            decay=self.config.decay == "all" or (parameter.ndim > 1 and not table),
            depth=backbone.depth_of(rest) if network == "backbone" else len(backbone.blocks) + 1,
            lr_factor=self.config.bias_lr_factor if name.endswith("bias") else 1.0,
        )


def to_transreid(method: Supervised) -> dict[str, Tensor]:
    """All weights under the names of TransReID's state dicts: base.*, bottleneck*, classifier.*."""
    student = method.student
    named = {f"base.{name}": tensor for name, tensor in student.backbone.state_dict().items()}
    return {name: tensor.cpu().contiguous() for name, tensor in (named | student.head.state_dict()).items()}
