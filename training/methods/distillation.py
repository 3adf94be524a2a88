"""What DINO, PASS and PersonViT share: a student that learns what its own moving average, the teacher, says of other
views of the same image.

Shapes: G = 2 global views, L local views, V views of one stack, S = student views of a token, T = G teacher views,
B images, C channels, N patches, K prototypes, M pairs of different views.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from datapipe.core.config import Size
from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings
from training.core.precision import Precision, full_precision
from training.core.schedules import teacher_temperature
from training.methods.base import Method, MethodSettings, Outcome, Role, TrainingProgress, Views
from training.nn import ics_stem
from training.nn.distillation_losses import entropy, pair_cross_entropies
from training.nn.drop_path import Paths, draw_path_masks, on_device
from training.nn.feature_diagnostics import information, of_features
from training.nn.heads import HeadConfig
from training.nn.teacher_targets import centre_sum, centred, move_centres, sinkhorn
from training.nn.vision_transformer import BackboneConfig, Features, VisionTransformer
from training.nn.workload import Stack

GLOBALS = 2
"""Global views, of which the teacher sees both."""


@settings
class DistillationConfig(MethodSettings):
    """What the methods of the DINO family have in common."""

    local_size: Size = (128, 64)
    """Size of a local view (height, width), pixels; both sides must be multiples of the patch."""
    head: HeadConfig = HeadConfig()
    """Shape of the projection heads."""
    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax in the first epoch."""
    teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature after the warm-up. Lower: sharper targets; under Sinkhorn 0.025 learns faster in short runs."""
    teacher_temp_warmup_epochs: int = Field(default=0, ge=0)
    """Epochs over which the teacher's temperature changes linearly from one to the other."""
    targets: Literal["centring", "sinkhorn"] = "centring"
    """How targets are kept from collapsing. "centring": as published. "sinkhorn": equal use of the prototypes in every
    batch, steadier in short runs; an alternative to the paper, and not to be combined with gradient accumulation."""
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of the old centre that stays at each step (centring only)."""
    freeze_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs in which the prototypes do not move. Helps at the start; 0 for runs of few epochs."""
    health_every: int = Field(default=4, ge=1)
    """Steps from one look at the targets over all prototypes, target_entropy and target_information, to the next: such
    a look reads all of them several times. A collapse is told after 20 looks. Changes nothing else."""


D = TypeVar("D", bound=DistillationConfig)
"""The settings of one of them."""
PathMasks = tuple[Paths, Paths]
"""What drop path leaves of the global and of the local stack, from `on_device`."""


SQUARE = [3 / 4, 4 / 3]
"""torchvision's default ratio of a random resized crop."""

COLOURS = {
    "views.flip": 0.5,
    "views.grey": 0.2,
    "views.blur": [1.0, 0.1, 0.5],
    "views.blur_sigma": [0.1, 2.0],
    "views.solarise": [0.0, 0.2, 0.0],
    "views.erase": [0.0, 0.0, 0.0],
    "views.interpolation": "bicubic",
    "views.jitter.probability": 0.8,
    "views.jitter.brightness": 0.4,
    "views.jitter.contrast": 0.4,
    "views.jitter.saturation": 0.2,
    "views.jitter.hue": 0.1,
    "views.jitter.white_balance": 0.0,
}
"""The augmentation of DINO, TransReID-SSL, PASS and iBOT."""

FAMILY = {
    "views.global_scale": [0.4, 1.0],
    "views.global_ratio": SQUARE,
    "views.local_ratio": SQUARE,
    "backbone.size": [256, 128],
    "backbone.patch": 16,
    "backbone.drop_path": 0.1,
    "backbone.init_std": 0.02,
    "init.weights": "",
    "method.local_size": [128, 64],
    "method.student_temp": 0.1,
    "method.warmup_teacher_temp": 0.04,
    "method.teacher_temp": 0.04,
    "method.teacher_temp_warmup_epochs": 0,
    "method.targets": "centring",
    "method.centre_momentum": 0.9,
    "method.freeze_last_layer_epochs": 1,
    "method.head.out_dim": 65_536,
    "method.head.hidden": 2_048,
    "method.head.bottleneck": 256,
    "method.head.layers": 3,
    "method.head.norm_last_layer": True,
    "method.head.init_std": 0.02,
    "optimisation.epochs": 100.0,
    "optimisation.final_lr": 1e-6,
    "optimisation.warmup_epochs": 10.0,
    "optimisation.betas": [0.9, 0.999],
    "optimisation.eps": 1e-8,
    "optimisation.weight_decay": 0.04,
    "optimisation.final_weight_decay": 0.4,
    "optimisation.layer_decay": 1.0,
    "optimisation.clip": "tensor",
    "optimisation.clip_norm": 3.0,
    "optimisation.ema": 0.996,
    "optimisation.final_ema": 1.0,
    "optimisation.ema_points": [],
    "optimisation.precision": "fp16",
}
"""What TransReID-SSL and PASS have in common."""


class TokenViews(NamedTuple):
    """What a network says of each token in all views it was seen in."""

    logits: dict[str, Tensor]
    """"cls" and what other tokens there are -> [S, B, K]: the globals first, then the locals that have this token."""
    cls_GBC: Tensor
    """CLS of the global views."""


class Network(Protocol):
    """Student or teacher: a backbone and its head."""

    tokens: tuple[str, ...]
    """Names of the tokens with prototypes, targets and a centre of their own; "cls" first."""
    backbone: VisionTransformer
    head: nn.Module

    def __call__(self, views: Views, *, learning: bool, precision: Precision, path_masks: PathMasks = ...) -> Any:
        """`learning`: the student's part, local views too. Otherwise the teacher's, whole global views only."""
        ...


class StudentTeacherOutput(NamedTuple):
    """What student and teacher said of a micro-batch."""

    student: TokenViews
    teacher: TokenViews
    targets: dict[str, Tensor]
    """Token -> [T, B, K], probabilities."""
    pairs: dict[str, Tensor]
    """Token -> [M, B], the cross-entropy of every pair of different views."""


class Distillation(Method[D]):
    """Student and teacher, their targets, centres and roles; a subclass says what the two are and what it averages."""

    student: Any  # a Network and a module
    teacher: Any

    def __init__(self, config: D, backbone: BackboneConfig, student: nn.Module) -> None:
        super().__init__(config, backbone)
        if config.local_size[0] % backbone.patch or config.local_size[1] % backbone.patch:
            raise ConfigError(f"patch = {backbone.patch} does not divide local_size = {config.local_size}",
                              where="method.local_size", hint="sizes are (height, width) in pixels")  # fmt: skip
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        if config.targets == "centring":
            for token in self.student.tokens:
                self.register_buffer(f"centre_{token}", torch.zeros(1, self.prototypes(token)))

    def prototypes(self, token: str) -> int:
        """K of a token's head."""
        del token
        return self.config.head.out_dim

    def centre_momentum(self, token: str) -> float:
        """Share of a token's old centre that stays."""
        del token
        return self.config.centre_momentum

    def temperature(self, token: str, epoch: int) -> float:
        """The temperature of the teacher's softmax over a token's prototypes."""
        del token
        return teacher_temperature(
            epoch,
            warmup=self.config.warmup_teacher_temp,
            final=self.config.teacher_temp,
            warmup_epochs=self.config.teacher_temp_warmup_epochs,
        )

    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """The teacher, then the student, then the loss in full precision."""
        with torch.no_grad():
            teacher = self.teacher(views, learning=False, precision=self.precision)
        student = self.student(
            views, learning=True, precision=self.precision, path_masks=self._path_masks(views, progress)
        )
        with full_precision(views["global"].device):
            outcome = self.compare(student, teacher, views, progress)
        share = views["weight"].sum().to(outcome.loss.dtype)
        return outcome._replace(sums={**outcome.sums, **ics_stem.take_statistics(self, share)})

    @abstractmethod
    def compare(self, student: Any, teacher: Any, views: Views, progress: TrainingProgress) -> Outcome:
        """The loss, from what the networks said."""

    def distil(self, student: TokenViews, teacher: TokenViews, weight_B: Tensor, epoch: int) -> StudentTeacherOutput:
        """Targets, and the cross-entropy of every pair of different views, token by token."""
        targets_TBK = {
            token: self.targets_of(token, rows_TBK, weight_B, epoch) for token, rows_TBK in teacher.logits.items()
        }
        pairs_MB = {
            token: pair_cross_entropies(rows_SBK, targets_TBK[token], student_temp=self.config.student_temp)
            for token, rows_SBK in student.logits.items()
        }
        return StudentTeacherOutput(student, teacher, targets_TBK, pairs_MB)

    def targets_of(self, token: str, logits_TBK: Tensor, weight_B: Tensor, epoch: int) -> Tensor:
        """Probabilities over a token's prototypes: [T, B, K]."""
        temperature = self.temperature(token, epoch)
        if self.config.targets == "sinkhorn":
            return sinkhorn(logits_TBK, weight_B, temperature=temperature)
        return centred(logits_TBK, self.get_buffer(f"centre_{token}"), temperature=temperature)

    def flat_mean(self, output: StudentTeacherOutput, weight_B: Tensor, metrics: dict[str, Tensor]) -> Outcome:
        """One mean over the pairs of all tokens, image by image; the centres' sums.

        loss[b] = (sum over tokens, pairs of that token) H / (number of all pairs)
        """
        loss_B = torch.cat(list(output.pairs.values())).mean(dim=0)
        return self.outcome(loss_B, weight_B, output.teacher.logits, metrics)

    def outcome(
        self, loss_B: Tensor, weight_B: Tensor, taught_TBK: Mapping[str, Tensor], metrics: dict[str, Tensor]
    ) -> Outcome:
        """The weighted loss, and what moves the centres of these teacher logits."""
        weight_B = weight_B.to(loss_B.dtype)
        sums = {}
        if self.config.targets == "centring":
            sums = {f"centre_{token}": centre_sum(rows, weight_B) for token, rows in taught_TBK.items()}
        return Outcome((weight_B * loss_B).sum(), sums, metrics)

    def looks_at_targets(self, progress: TrainingProgress) -> bool:
        """Is this a step whose metrics include those over all prototypes?"""
        return progress.step % self.config.health_every == 0

    @torch.no_grad()
    def metrics(self, output: StudentTeacherOutput, weight_B: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        """The CLS term, and what a run is watched by; tokens other than CLS add theirs under a suffix.

        target_entropy:     of the targets of CLS, nats; uniform_entropy is its ceiling, ln K
        target_information: what these targets say of which image they are for; both where `looks_at_targets`
        student_teacher_cosine: features of the student in one global view, of the teacher in the other
        """
        learnt_BC, other_BC = output.student.cls_GBC[0], output.teacher.cls_GBC[1]
        loss_B, looked = output.pairs["cls"].detach().mean(dim=0), {}
        if self.looks_at_targets(progress):
            looked = {
                "target_entropy": entropy(output.targets["cls"]).mean(dim=0),
                "target_information": information(output.targets["cls"], weight_B),
            }
        return {
            "loss_cls": loss_B,
            "uniform_entropy": torch.full_like(loss_B, math.log(self.prototypes("cls"))),
            **looked,
            "student_teacher_cosine": F.cosine_similarity(learnt_BC, other_BC, dim=-1),
            **of_features(output.teacher.cls_GBC[0], weight_B),
        }

    def after_step(self, sums: dict[str, Tensor], progress: TrainingProgress) -> None:
        """Move each token's centre towards the mean of the teacher's raw logits over this step's global batch, and the
        running statistics of a stem with batch norm."""
        moving = {name: token for token in self.student.tokens if (name := f"centre_{token}") in sums}
        if moving:
            centres = [self.get_buffer(name) for name in moving]
            momenta = [self.centre_momentum(token) for token in moving.values()]
            move_centres(centres, [sums[name] for name in moving], momenta)
        ics_stem.settle(self, sums)

    def roles(self) -> dict[str, Role]:
        """Decay for all but biases and norms: tokens, positions and prototypes too, as the references have it."""
        return {
            f"student.{name}": self._role(name, parameter)
            for name, parameter in self.student.named_parameters()
            if parameter.requires_grad
        }

    def _role(self, name: str, parameter: nn.Parameter) -> Role:
        network, _, rest = name.partition(".")
        after_all = len(self.student.backbone.blocks) + 1
        return Role(
            decay=parameter.ndim > 1 and not name.endswith(".bias"),
            depth=self.student.backbone.depth_of(rest) if network == "backbone" else after_all,
            release_epoch=self.config.freeze_last_layer_epochs if "last_layer" in name else 0,
        )

    def backbone(self) -> VisionTransformer:
        backbone: VisionTransformer = self.teacher.backbone
        return backbone

    def centres(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("centre_")}

    def couples_batch(self) -> bool:
        return self.config.targets == "sinkhorn" or self.student.backbone.config.stem == "ics"

    def _path_masks(self, views: Views, progress: TrainingProgress) -> PathMasks:
        backbone, position = self.student.backbone, views["position"]
        drawn = [
            draw_path_masks(
                backbone.config.drop_rates,
                seed=progress.seed,
                purpose=f"drop_path/{kind}",
                position=position,
                views=count,
            )
            for kind, count in (("global", len(views["global"])), ("local", len(views.get("local", ()))))
        ]
        global_, local = on_device(drawn, views["global"].device, whole=backbone.compiled)
        return global_, local


def stacks(
    config: DistillationConfig, backbone: BackboneConfig, images: int, *, locals: int, parts: int = 0, near: int = 0
) -> tuple[tuple[Stack, ...], tuple[Stack, ...]]:
    """(what the student sees, what the teacher sees) of so many images. `parts`: part tokens of a global view; `near`:
    of one of the `locals`."""
    patches = math.prod(backbone.grid)
    small = math.prod(side // backbone.patch for side in config.local_size)
    whole = Stack(GLOBALS * images, backbone.size, patches, 1 + parts + patches)
    local = Stack(locals * images, config.local_size, small, 1 + near + small)
    return (whole, local)[: 2 if locals else 1], (whole,)


def forward_views(backbone: VisionTransformer, stack_VBIHW: Tensor, weight_B: Tensor, **options: Any) -> Features:
    """What the backbone makes of a stack of views: [V, B, ...] each. `options` as in `VisionTransformer.forward`."""
    views, images = stack_VBIHW.shape[:2]
    tokens = backbone(stack_VBIHW.flatten(0, 1), real=(weight_B > 0).repeat(views), **options)
    return Features(*(kind.unflatten(0, (views, images)) for kind in tokens[:3]))
