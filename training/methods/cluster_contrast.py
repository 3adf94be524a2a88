"""Unsupervised ReID (USL) by cluster contrast, as TransReID-SSL and PASS train it
(`examples/cluster_contrast_train_usl.py`); domain-adaptive (UDA) when weights come from supervised training elsewhere.

At the start of every epoch all training images are embedded, clustered (`training/clustering`), and the clusters' mean
features become the memory; images outside all clusters take no part in the epoch. A batch is so many clusters with
`instances` images each, and its loss the cross-entropy of every image over all clusters:

    loss[b] = -log softmax_k(u_b . m_k / temperature)[cluster of b],    u_b the normalised feature

After the step the memory moves towards the batch (`training/nn/identity/cluster_memory.py`).

Shapes: B images of this process, N training images, H x W pixels, C channels of a token, P part tokens, F channels of
the feature, K clusters.
"""

import math
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings
from datapipe.views.spec import ViewSpec, padded
from training.clustering.settings import ClusteringConfig
from training.core.device_copy import to_device
from training.core.precision import Precision, at_least_float32, autocast_region, full_precision
from training.methods.base import (
    ByCluster,
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
from training.nn.identity.cluster_memory import UpdateRule, centroids, contrast, updated
from training.nn.identity.fusion import Fusion
from training.nn.identity.necks import FEATURE, TokenNecks
from training.nn.identity.random_erasing import CONSTANT
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Workload


@settings
class ClusterContrastConfig(MethodSettings):
    """Learning from pseudo labels. Of the settings under `views` only `flip`, `interpolation` and `statistics` apply.

    Published runs use the cameras of the training images as labels: see `cameras`.
    """

    name: Literal["cluster_contrast"] = "cluster_contrast"
    """The method."""
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    """How features become pseudo labels."""
    iterations: int = Field(default=200, ge=1)
    """Steps of an epoch, between two clusterings."""
    instances: int = Field(default=8, ge=1)
    """Images of each cluster in a batch, K; `optimisation.batch` must be a multiple of it."""
    cameras: bool = True
    """Draw the other images of a cluster from other cameras than the first one's, as published: camera ids are used as
    labels. Needs them; False: any images."""
    images: int = Field(default=0, ge=0)
    """Training images. 0: counted when the run starts."""
    parts: int = Field(default=0, ge=0)
    """Part tokens of the backbone."""
    fusion: Fusion = "cat"
    """With parts: "cat" the feature is [CLS ; mean of the parts] (PASS on Market-1501), "mean" (CLS + mean of the
    parts) / 2 (on MSMT17)."""
    neck: Literal["one", "each"] = "one"
    """Batch norm in front of the memory. "one": of the feature (PASS's USL); "each": CLS and every part have their own
    (its UDA)."""
    norm_group: int = Field(default=64, ge=0)
    """Neighbouring images of the global batch that the necks normalise together: published is the share of one GPU,
    64 on Market-1501 (four of them), 128 on MSMT17 (two). The running statistics are the first group's. 0: all."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the softmax over clusters."""
    momentum: float = Field(default=0.2, ge=0, le=1)
    """Share of a cluster's old centroid that stays at an update."""
    update: UpdateRule = "hardest"
    """What a centroid moves towards. "hardest": the image of the batch that is least like it (published); "each": all
    of its images, one after the other (cluster-contrast-reid since 2021-11)."""
    pad: int = Field(default=10, ge=0)
    """Black pixels around the resized image before it is cut at random."""
    erase: float = Field(default=0.5, ge=0, le=1)
    """Share of images with a rectangle of a constant colour."""


_CODE = "cluster-contrast scripts of TransReID-SSL and PASS"
_COMMON = by_source(_CODE, {
    "views.flip": 0.5,
    "views.interpolation": "bicubic",
    "views.statistics": "half",
    "backbone.size": [256, 128],
    "backbone.drop_path": 0.3,
    "init.positions": "bilinear",
    "method.name": "cluster_contrast",
    "method.iterations": 200,
    "method.instances": 8,
    "method.cameras": True,
    "method.temperature": 0.05,
    "method.momentum": 0.2,
    "method.update": "hardest",
    "method.pad": 10,
    "method.erase": 0.5,
    "method.clustering.k1": 30,
    "method.clustering.k2": 6,
    "method.clustering.min_samples": 4,
    "evaluation.interpolation": "bicubic",
    "evaluation.quote": "best",
    "optimisation.optimizer": "sgd",
    "optimisation.momentum": 0.9,
    "optimisation.schedule": "staircase",
    "optimisation.staircase_epochs": 20,
    "optimisation.staircase_factor": 0.1,
    "optimisation.epochs": 50.0,
    "optimisation.batch": 256,
    "optimisation.lr": 3.5e-4,
    "optimisation.warmup_epochs": 0.0,
    "optimisation.weight_decay": 5e-4,
    "optimisation.final_weight_decay": 5e-4,
    "optimisation.layer_decay": 1.0,
    "optimisation.clip": "none",
    "optimisation.precision": "fp32",
})  # fmt: skip


def _variant(*, eps: float, group: int, every_epochs: float, **more: Any) -> PublishedRecipe:
    """What differs among the scripts."""
    return PublishedRecipe(_COMMON | by_source(_CODE, {
        "method.clustering.eps": eps, "method.norm_group": group, "evaluation.every_epochs": every_epochs,
        **{f"method.{name}": value for name, value in more.items()},
    }))  # fmt: skip


PUBLISHED = {
    "usl_market": _variant(eps=0.6, group=64, every_epochs=10.0, parts=0, neck="one"),
    "usl_msmt17": _variant(eps=0.7, group=128, every_epochs=50.0, parts=0, neck="one"),
    "usl_pass_market": _variant(eps=0.6, group=64, every_epochs=10.0, parts=3, fusion="cat", neck="one"),
    "usl_pass_msmt17": _variant(eps=0.7, group=128, every_epochs=50.0, parts=3, fusion="mean", neck="one"),
    "uda_pass_market": _variant(eps=0.6, group=64, every_epochs=10.0, parts=3, fusion="cat", neck="each"),
    "uda_pass_msmt17": _variant(eps=0.7, group=128, every_epochs=10.0, parts=3, fusion="mean", neck="each"),
}


class ContrastOutput(NamedTuple):
    """What the network makes of images."""

    feature_BF: Tensor
    """Behind the necks."""
    cls_BC: Tensor
    parts_BPC: Tensor


class ContrastStudent(nn.Module):
    """Backbone and necks."""

    def __init__(self, config: ClusterContrastConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(backbone, parts=config.parts)
        self.head = TokenNecks(self.backbone.width, config.parts, fusion=config.fusion, neck=config.neck,
                               group=config.norm_group)  # fmt: skip

    def forward(
        self, images_BIHW: Tensor, real_B: Tensor | None, *, precision: Precision, path_masks: Paths
    ) -> ContrastOutput:
        with autocast_region(precision, images_BIHW.device):
            seen = self.backbone(images_BIHW, path_masks=path_masks, real=real_B)
        with full_precision(images_BIHW.device):
            cls_BC, parts_BPC = at_least_float32(seen.cls), at_least_float32(seen.parts)
            return ContrastOutput(self.head(cls_BC, parts_BPC, real_B), cls_BC, parts_BPC)


class ClusterContrast(Method[ClusterContrastConfig]):
    """Contrast of images with the centroids of their clusters."""

    student: ContrastStudent
    memory: Tensor
    labels: Tensor
    fine_tunes = True
    task = "usl"
    published = PUBLISHED

    def __init__(self, config: ClusterContrastConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone)
        self.student = ContrastStudent(config, backbone)
        # two clusters of zeros until the first clustering: the rehearsal's labels are 0 and 1
        self.register_buffer("memory", torch.zeros(2, self.student.head.channels))
        self.register_buffer("labels", torch.full((config.images,), -1, dtype=torch.int64))

    @staticmethod
    def views(config: ClusterContrastConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        spec = padded(views, size=backbone.size, pad=config.pad)
        return replace(spec, erasing=CONSTANT.spec(backbone.size, config.erase))

    @staticmethod
    def by_cluster(config: ClusterContrastConfig) -> ByCluster:
        return ByCluster(config.clustering, config.instances, config.iterations, config.cameras, config.norm_group)

    @staticmethod
    def for_images(config: ClusterContrastConfig, count: int) -> ClusterContrastConfig:
        if config.images not in (0, count):
            raise ConfigError(f"the recipe is for {config.images} training images, the data has {count}",
                              where="method.images", hint="0: as many as there are")  # fmt: skip
        return replace(config, images=count)

    @staticmethod
    def parts(config: ClusterContrastConfig) -> int:
        return config.parts

    @staticmethod
    def fusion(config: ClusterContrastConfig) -> Fusion:
        return config.fusion

    @staticmethod
    def quoted_feature(parts: int, fusion: Fusion) -> str:
        """What is trained is what is ranked by."""
        del parts, fusion
        return FEATURE

    @staticmethod
    def for_weights(config: ClusterContrastConfig, parts: int) -> ClusterContrastConfig:
        return replace(config, parts=parts, neck=config.neck if parts else "one")

    @classmethod
    def workload(
        cls, config: ClusterContrastConfig, views: ViewConfig, backbone: BackboneConfig, images: int
    ) -> Workload:
        """There is no teacher; products with the memory are less than 1e-3 of all."""
        erased = erased_numbers(backbone, images, config.erase)
        return super().workload(config, views, backbone, images)._replace(loss_alive=erased, products_complete=True)

    @classmethod
    def nearest_recipe(cls, run: Mapping[str, Any]) -> str:
        """The one for such weights and such a data set, which the radius of the clustering tells."""
        target = "msmt17" if run["method.clustering.eps"] >= 0.7 else "market"
        if not run["method.parts"]:
            return f"usl_{target}"
        return f"uda_pass_{target}" if run["method.neck"] == "each" else f"usl_pass_{target}"

    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """Recorded of each image: the loss, ln K as its value at chance, the cosine with its own centroid, whether that
        is the nearest one."""
        weight_B, position_B = views["weight"], views["position"]
        images_BIHW, label_B, real_B, path_masks = identity_batch(
            views,
            progress,
            backbone=self.student.backbone,
            erasing=CONSTANT,
            probability=self.config.erase,
        )
        output = self.student(images_BIHW, real_B, precision=self.precision, path_masks=path_masks)
        with full_precision(weight_B.device):
            unit_BF = F.normalize(output.feature_BF, dim=1)
            memory_KF = self.memory.to(unit_BF.dtype)
            loss_B, logits_BK = contrast(unit_BF, label_B, memory_KF, self.config.temperature)
            weight_B = weight_B.to(loss_B.dtype)
            own_B = logits_BK.gather(1, label_B.clamp(min=0)[:, None])[:, 0] * self.config.temperature
            metrics = {
                "loss_cluster": loss_B.detach(),
                "uniform_entropy_cluster": torch.full_like(loss_B, math.log(len(memory_KF))).detach(),
                "own_centroid": own_B.detach(),
                "identified": (logits_BK.argmax(dim=1) == label_B).to(loss_B.dtype),
                **of_features(output.feature_BF.detach(), weight_B),
            }
            first = to_device(position_B[:1] == progress.samples, weight_B.device, loss_B.dtype)
            sums = ics_stem.take_statistics(self, weight_B.sum(), first=first)
            return Outcome(
                (weight_B * loss_B).sum(), sums | self._of_batch(unit_BF, label_B, position_B, progress), metrics
            )

    def after_step(self, sums: dict[str, Tensor], progress: TrainingProgress) -> None:
        """Move the memory by the whole global batch, in its order: the same on any number of ranks."""
        ics_stem.settle(self, sums)
        label = sums["contrast/label"].round().to(torch.int64) - 1
        memory = updated(self.memory, sums["contrast/feature"], label, momentum=self.config.momentum,
                         rule=self.config.update)  # fmt: skip
        self.memory.copy_(memory)

    def begin_epoch(self, labels_N: Tensor, features_NF: Tensor) -> None:
        self.labels.copy_(labels_N)
        self.memory = centroids(features_NF.to(self.memory), labels_N.to(self.memory.device))

    def adopt_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if "memory" in shapes:
            self.memory = self.memory.new_zeros(shapes["memory"])

    def roles(self) -> dict[str, Role]:
        """Weight decay on everything, one learning rate, as published."""
        backbone = self.student.backbone
        depths = {name: backbone.depth_of(name.removeprefix("student.backbone."))
                  for name, value in self.named_parameters()
                  if value.requires_grad and name.startswith("student.backbone.")}  # fmt: skip
        necks = {name: len(backbone.blocks) + 1 for name, value in self.named_parameters()
                 if value.requires_grad and name not in depths}  # fmt: skip
        return {name: Role(decay=True, depth=depth) for name, depth in (depths | necks).items()}

    def backbone(self) -> VisionTransformer:
        return self.student.backbone

    def necks(self) -> TokenNecks:
        return self.student.head

    def extra_exports(self) -> dict[str, dict[str, Tensor]]:
        """Backbone and necks under the names of the reference's state dict."""
        student = self.student
        named = student.backbone.state_dict() | student.head.state_dict()
        return {"fine_tuned.safetensors": {name: tensor.cpu().contiguous() for name, tensor in named.items()}}

    def couples_batch(self) -> bool:
        """Batch norm does, within its groups: `ByCluster.group` says which images must stay together."""
        return not self.config.norm_group or self.student.backbone.config.stem == "ics"

    def _of_batch(
        self, unit_BF: Tensor, label_B: Tensor, position_B: Tensor, progress: TrainingProgress
    ) -> dict[str, Tensor]:
        """Features and labels (from 1; 0: padding) at their places in the global batch: what the ranks' sums put
        together."""
        place = to_device((position_B - progress.samples).clamp(min=0), unit_BF.device)
        real = (label_B >= 0).to(unit_BF.dtype)
        feature = unit_BF.new_zeros(progress.batch, unit_BF.shape[1])
        labels = unit_BF.new_zeros(progress.batch)
        return {
            "contrast/feature": feature.index_add_(0, place, unit_BF.detach() * real[:, None]),
            "contrast/label": labels.index_add_(0, place, (label_B + 1).to(unit_BF.dtype)),
        }
