"""PASS: part-aware self-supervised pre-training (Zhu et al., ECCV 2022; reference `PASS/main_pass.py`).

Shapes: G = 2 global views, L local views, S = student views of a token, T = G teacher views, B images, C channels,
K prototypes, M pairs of different views.
"""

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from datapipe.config import Range, Size, ViewConfig
from datapipe.errors import ConfigError
from datapipe.settings import settings
from datapipe.views import ViewSpec, multi_crop
from training import targets
from training.backbone import BackboneConfig, VisionTransformer, keep_masks
from training.heads import HeadConfig, TokenHeads
from training.health import cosine_to_others
from training.losses import entropy, pair_cross_entropies
from training.methods.base import Method, Outcome, Precision, Progress, Role, Views, at_least_float32, full, lowered
from training.schedules import teacher_temperature


@settings
class PassConfig:
    """PASS: a part token for each of several overlapping horizontal bands learns from crops of its own band."""

    name: Literal["pass"] = "pass"
    """The method."""
    parts: int = Field(default=3, ge=1)
    """P, number of bands and of part tokens."""
    part_overlap: float = Field(default=0.5, ge=0, lt=1)
    """Share of its height that a band has in common with the next one. All bands are equally high and together cover
    the image: 3 bands at 0.5 are half the height each, starting at 0, 1/4 and 1/2."""
    locals_per_part: int = Field(default=3, ge=1)
    """Local views cut from each band."""
    local_size: Size = (128, 64)
    """Size of a local view (height, width), pixels; both sides must be multiples of the patch."""
    head: HeadConfig = HeadConfig()
    """Shape of the heads: one for CLS and one for each part token, nothing shared."""
    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax in the first epoch."""
    teacher_temp: float = Field(default=0.04, gt=0)
    """The same after the warm-up. Lower: sharper targets; under Sinkhorn 0.025 learns faster in short runs."""
    teacher_temp_warmup_epochs: int = Field(default=0, ge=0)
    """Epochs over which the teacher's temperature changes linearly from one to the other."""
    targets: Literal["centring", "sinkhorn"] = "centring"
    """How targets are kept from collapsing. "centring": as published. "sinkhorn": equal use of the prototypes in every
    batch, steadier in short runs; an alternative to the paper, and not to be combined with gradient accumulation."""
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of the old centre that stays at each step (centring only)."""
    freeze_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs in which the prototypes do not move. Helps at the start; 0 for runs of few epochs."""

    @property
    def bands(self) -> tuple[Range, ...]:
        """(top, bottom) of each band as shares of the height."""
        stride = 1 - self.part_overlap
        height = 1 / (1 + (self.parts - 1) * stride)
        return tuple(
            (part * stride * height, min(part * stride * height + height, 1.0)) for part in range(self.parts)
        )

    @property
    def areas(self) -> list[int]:
        """The part, 1-based, that each local view belongs to: 1, 1, 1, 2, 2, 2, ..."""
        return [part for part in range(1, self.parts + 1) for _ in range(self.locals_per_part)]


class TokenViews(NamedTuple):
    """What a network says of each token in all views it was seen in."""

    logits: dict[str, Tensor]
    """"cls" and "pt1", "pt2", ... -> [S, B, K]: the globals first, then the locals that have this token."""
    cls_GBC: Tensor
    """CLS of the global views."""


class PassNetwork(nn.Module):
    """Backbone with P part tokens and a head per token."""

    def __init__(self, config: PassConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.tokens = ("cls", *(f"pt{part}" for part in range(1, config.parts + 1)))
        self.areas = config.areas
        self.backbone = VisionTransformer(backbone, parts=config.parts)
        self.head = TokenHeads(self.backbone.width, config.head, self.tokens)

    def forward(
        self,
        globals_GBIHW: Tensor,
        locals_LBIHW: Tensor | None = None,
        *,
        precision: Precision,
        keep: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> TokenViews:
        """Globals carry CLS and all parts, a local CLS and the part of its band. `keep`: drop path, of either stack."""
        device = globals_GBIHW.device
        with lowered(precision, device):
            seen = self.backbone(globals_GBIHW.flatten(0, 1), part="all", keep=keep[0])
            views = globals_GBIHW.shape[:2]
            rows = {"cls": [seen.cls.unflatten(0, views)]}
            for part, token in enumerate(self.tokens[1:]):
                rows[token] = [seen.parts[:, part].unflatten(0, views)]
            if locals_LBIHW is not None:
                near = self.backbone(locals_LBIHW.flatten(0, 1), part=self.areas, keep=keep[1])
                views = locals_LBIHW.shape[:2]
                rows["cls"].append(near.cls.unflatten(0, views))
                by_area = near.parts[:, 0].unflatten(0, views).chunk(len(self.tokens) - 1)
                for token, part_rows in zip(self.tokens[1:], by_area, strict=True):
                    rows[token].append(part_rows)
        with full(device):
            logits = self.head({token: at_least_float32(torch.cat(stacks)) for token, stacks in rows.items()})
        return TokenViews(logits, rows["cls"][0])


class Pass(Method):
    """Self-distillation of CLS over all views and of each part token over globals and the locals of its band."""

    student: PassNetwork
    teacher: PassNetwork

    def __init__(self, config: PassConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone)
        self.config: PassConfig = config
        if config.local_size[0] % backbone.patch or config.local_size[1] % backbone.patch:
            raise ConfigError(f"patch = {backbone.patch} does not divide local_size = {config.local_size}",
                              where="method.local_size", hint="sizes are (height, width) in pixels")  # fmt: skip
        self.student = PassNetwork(config, backbone)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if config.targets == "centring":
            for token in self.student.tokens:
                self.register_buffer(f"centre_{token}", torch.zeros(1, config.head.out_dim))

    @staticmethod
    def views(config: PassConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        bands = tuple(config.bands[area - 1] for area in config.areas)
        return multi_crop(views, size=backbone.size, local_size=config.local_size, local_bands=bands)

    def forward(self, views: Views, progress: Progress) -> Outcome:
        """One flat mean over the pairs of all tokens, image by image:

            loss[b] = (sum over pairs of CLS + sum over parts i, pairs of P_i) H / (number of all pairs)

        With 2 globals, 3 parts and 3 locals each: 20 + 3 * 8 = 44 terms.
        """
        globals_, locals_, weight_B = views["global"], views["local"], views["weight"]
        with torch.no_grad():
            taught = self.teacher(globals_, precision=self.precision)
        learnt = self.student(globals_, locals_, precision=self.precision, keep=self._keep(views, progress))
        with full(globals_.device):
            targets_TBK = self._targets(taught.logits, weight_B, progress.epoch)
            pairs_MB = {
                token: pair_cross_entropies(logits, targets_TBK[token], student_temp=self.config.student_temp)
                for token, logits in learnt.logits.items()
            }
            loss_B = torch.cat(list(pairs_MB.values())).mean(dim=0)
            weight_B = weight_B.to(loss_B.dtype)
            sums = {}
            if self.config.targets == "centring":
                sums = {f"centre_{token}": targets.centre_sum(taught.logits[token], weight_B) for token in targets_TBK}
            metrics = self._metrics(pairs_MB, targets_TBK, learnt, taught, weight_B)
        return Outcome((weight_B * loss_B).sum(), sums, metrics)

    def after_step(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """Move each token's centre towards the mean of the teacher's raw logits over this step's global batch."""
        for name, mean_1K in sums.items():
            centre_1K = self.get_buffer(name)
            centre_1K.copy_(targets.moved_centre(centre_1K, mean_1K, self.config.centre_momentum))

    def roles(self) -> dict[str, Role]:
        """Decay for all but biases and norms: tokens, positions and prototypes too, as the reference has it."""
        return {
            f"student.{name}": self._role(name, parameter)
            for name, parameter in self.student.named_parameters()
            if parameter.requires_grad
        }

    def backbone(self) -> VisionTransformer:
        return self.teacher.backbone

    def couples_batch(self) -> bool:
        return self.config.targets == "sinkhorn"

    def _role(self, name: str, parameter: nn.Parameter) -> Role:
        network, _, rest = name.partition(".")
        after_all = len(self.student.backbone.blocks) + 1
        return Role(
            decay=parameter.ndim > 1 and not name.endswith(".bias"),
            depth=self.student.backbone.depth_of(rest) if network == "backbone" else after_all,
            release_epoch=self.config.freeze_last_layer_epochs if "last_layer" in name else 0,
        )

    def _keep(self, views: Views, progress: Progress) -> tuple[Tensor | None, Tensor | None]:
        rates, position = self.student.backbone.config.drop_rates, views["position"]
        global_, local = (
            keep_masks(rates, seed=progress.seed, purpose=f"drop_path/{kind}", position=position, views=count)
            for kind, count in (("global", len(views["global"])), ("local", len(views["local"])))
        )
        return global_, local

    def _targets(self, logits: dict[str, Tensor], weight_B: Tensor, epoch: int) -> dict[str, Tensor]:
        config = self.config
        temperature = teacher_temperature(
            epoch,
            warmup=config.warmup_teacher_temp,
            final=config.teacher_temp,
            warmup_epochs=config.teacher_temp_warmup_epochs,
        )
        if config.targets == "sinkhorn":
            return {token: targets.sinkhorn(rows, weight_B, temperature=temperature) for token, rows in logits.items()}
        return {
            token: targets.centred(rows, self.get_buffer(f"centre_{token}"), temperature=temperature)
            for token, rows in logits.items()
        }

    @torch.no_grad()
    def _metrics(
        self,
        pairs_MB: dict[str, Tensor],
        targets_TBK: dict[str, Tensor],
        learnt: TokenViews,
        taught: TokenViews,
        weight_B: Tensor,
    ) -> dict[str, Tensor]:
        """Terms of the loss, and signs of collapse: entropies at ln K, images that all look alike (cosine near 1)."""
        parts = [pairs for token, pairs in pairs_MB.items() if token != "cls"]
        unsure = {token: entropy(probabilities).mean(dim=0) for token, probabilities in targets_TBK.items()}
        return {
            "loss_cls": pairs_MB["cls"].detach().mean(dim=0),
            "loss_part": torch.cat(parts).detach().mean(dim=0),
            "teacher_entropy": unsure.pop("cls"),
            "teacher_entropy_part": torch.stack(list(unsure.values())).mean(dim=0),
            "cosine": cosine_to_others(taught.cls_GBC[0], weight_B),
            "student_teacher_cosine": F.cosine_similarity(learnt.cls_GBC[0], taught.cls_GBC[1], dim=-1),
        }
