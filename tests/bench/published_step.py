"""The training step as published loops are written, as a yardstick for ours: same weights, views and random numbers.

Written for the bench after what the reference repositories do (`main_dino.py` of TransReID-SSL, `main_pass.py`,
`main_ibot.py`, BootMAE's `modeling_pretrain_bootmae.py`; PersonMAE's and PersonViT's own code is not public), plainly:

    networks    one forward pass per resolution; dropped branches are computed and multiplied by zero; PyTorch's weight
                norm; iBOT's head sees every patch, hidden or not
    precision   one autocast region around networks, heads and loss
    loss        pair by pair, a softmax of the student for each
    after it    parameter by parameter: norm, clip, AdamW, moving average

It works on parameters by their names, without modules, and is given the drop-path factors and the decoders' position
codes, which costs it less than the references pay.

Shapes: V views, B images, C channels, N patches, K prototypes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config.run_config import RunConfig
from training.core.precision import autocast_region
from training.core.schedules import grown, teacher_temperature
from training.engine.param_groups import group_parameters, settings_at
from training.methods.base import Method, TrainingProgress, Views
from training.methods.distillation import GLOBALS

Weights = Mapping[str, Tensor]
METHODS = ("dino", "pass", "personvit", "personmae")
"""Those whose step is written here, with centred targets and patches cut by one convolution."""


@dataclass(frozen=True)
class Drawn:
    """The random numbers of a step, and tables that references keep."""

    wide: Tensor | None = None
    """[2 * depth, images] drop-path factors of the global stack, of region A."""
    near: Tensor | None = None
    """The same of the local stack."""
    codes: Sequence[Tensor] = ()
    """[B, Q, W] position codes of the places that the pixel and the feature decoder predict."""


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Encoder:
    """A vision transformer on parameters with the names of the reference repositories."""

    weights: Weights
    patch: int
    grid: tuple[int, int]
    heads: int
    depth: int
    parts: int = 0

    def __call__(
        self,
        images: Tensor,
        parts: Sequence[int] = (),
        factors: Tensor | None = None,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> list[Tensor]:
        """What comes out of every block, and last the normed tokens. `parts`: part token of each chunk of the images;
        all of them where there is one chunk."""
        tokens = self._embedded(images, parts, mask, visible)
        found = []
        for block in range(self.depth):
            tokens = self._block(tokens, f"blocks.{block}.", None if factors is None else factors[2 * block :])
            found.append(tokens)
        return [*found, self._norm(tokens, "norm.")]

    def _embedded(self, images: Tensor, parts: Sequence[int], mask: Tensor | None, visible: Tensor | None) -> Tensor:
        weights, rows = self.weights, images.shape[-2] // self.patch
        projected = F.conv2d(
            images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=self.patch
        )
        patches = projected.flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask[..., None], weights["masked_embed"].to(patches.dtype), patches)
        table = weights["pos_embed"] if self.parts else weights["pos_embed"][:, 1:]
        if rows != self.grid[0]:
            columns = images.shape[-1] // self.patch
            factor = ((rows + 0.1) / self.grid[0], (columns + 0.1) / self.grid[1])
            square = table.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
            table = F.interpolate(square, scale_factor=factor, mode="bicubic").flatten(2).transpose(1, 2)
        patches = patches + table
        if visible is not None:
            patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        position = weights["cls_pos"] if self.parts else weights["pos_embed"][:, :1]
        prefix = [(weights["cls_token"] + position).expand(len(images), -1, -1)]
        if parts:
            chunks = [weights[f"part_token{part}"] + weights[f"part{part}_pos"] for part in parts]
            if rows == self.grid[0]:
                prefix += [chunk.expand(len(images), -1, -1) for chunk in chunks]
            else:
                prefix.append(torch.cat([chunk.expand(len(images) // len(parts), -1, -1) for chunk in chunks]))
        return torch.cat([*prefix, patches], dim=1)

    def _block(self, tokens: Tensor, name: str, factors: Tensor | None) -> Tensor:
        tokens = tokens + _dropped(self._attended(self._norm(tokens, f"{name}norm1."), f"{name}attn."), factors, 0)
        hidden = F.gelu(_linear(self._norm(tokens, f"{name}norm2."), self.weights, f"{name}mlp.fc1."))
        return tokens + _dropped(_linear(hidden, self.weights, f"{name}mlp.fc2."), factors, 1)

    def _attended(self, tokens: Tensor, name: str) -> Tensor:
        images, length, channels = tokens.shape
        packed = _linear(tokens, self.weights, f"{name}qkv.").reshape(images, length, 3, self.heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = _attention(query, key, value).transpose(1, 2).reshape(images, length, channels)
        return _linear(mixed, self.weights, f"{name}proj.")

    def _norm(self, tokens: Tensor, name: str) -> Tensor:
        return _layer_norm(tokens, self.weights, name)


def _linear(values: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(values, weights[f"{name}weight"], weights[f"{name}bias"])


def _layer_norm(values: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], weights[f"{name}weight"], weights[f"{name}bias"], 1e-6)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


def _dropped(branch: Tensor, factors: Tensor | None, which: int) -> Tensor:
    return branch if factors is None else branch * factors[which].to(branch.dtype)[:, None, None]


def _mlp(rows: Tensor, weights: Weights, name: str) -> Tensor:
    """A head's layers up to its unit vector."""
    layers = sorted(key for key in weights if key.startswith(name) and key.endswith("weight"))
    for place, key in enumerate(layers):
        rows = _linear(rows, weights, key.removesuffix("weight"))
        rows = F.gelu(rows) if place < len(layers) - 1 else rows
    return F.normalize(rows, dim=-1)


def _prototypes(rows: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(rows, torch._weight_norm(weights[f"{name}weight_v"], weights[f"{name}weight_g"], 0))


def _pairs(student: Tensor, targets: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The cross-entropy of every pair of different views, a mean over the images each. `student`: [V * B, K]."""
    views = (student / temperature).chunk(student.shape[0] // targets[0].shape[0])
    return [
        torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean()
        for teacher, target in enumerate(targets)
        for place, view in enumerate(views)
        if place != teacher
    ]


class PublishedStep:
    """Student, teacher, loss and optimizer of one recipe, all of a batch at once."""

    def __init__(self, config: RunConfig, method: Method) -> None:
        """`method`: whose weights it begins with; they are copied."""
        self.config, self.method_config = config, config.method
        own: dict[str, Tensor] = {name: value.detach().clone() for name, value in method.named_parameters()}
        trained = {name for name, value in method.named_parameters() if value.requires_grad}
        self.parameters = {name: nn.Parameter(value, requires_grad=name in trained) for name, value in own.items()}
        self.trained = {name: self.parameters[name] for name in own if name in trained}
        self.centres = {name: value.clone() for name, value in method.centres().items()}
        self.groups = group_parameters(method, layer_decay=config.optimisation.layer_decay)
        given = config.optimisation
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.parameters[name] for name in group.names]} for group in self.groups],
            betas=given.betas, eps=given.eps,
        )  # fmt: skip

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> float:
        """One whole step; the loss before it."""
        loss = self.forward(views, drawn, progress)
        loss.backward()
        self.after(progress)
        return float(loss.detach())

    def forward(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> Tensor:
        """The loss; centres move."""
        with autocast_region(self.config.optimisation.precision, views["weight"].device):
            forward = getattr(self, f"_{self.method_config.name}")
            loss: Tensor = forward(views, drawn, progress)
        return loss

    def after(self, progress: TrainingProgress) -> None:
        """Clip, step, moving average."""
        now = settings_at(self.config.optimisation, progress)
        for group, settings in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = now.lr * settings.lr_factor
            group["weight_decay"] = now.weight_decay if settings.decay else 0.0
        if self.config.optimisation.clip == "tensor":
            for value in self.trained.values():
                assert value.grad is not None
                norm = value.grad.norm(2)
                factor = self.config.optimisation.clip_norm / (norm + 1e-6)
                if factor < 1:
                    value.grad.mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, average in self.parameters.items():
                if name.startswith("teacher."):
                    learnt = self.parameters[f"student.{name.removeprefix('teacher.')}"]
                    average.data.mul_(now.ema).add_((1 - now.ema) * learnt.detach().data)

    def _networks(self, parts: int = 0) -> tuple[Encoder, Encoder, Weights, Weights]:
        """Encoder of student and teacher, and the rest of both."""
        given = self.config.backbone
        student, teacher = (_under(self.parameters, f"{name}.") for name in ("student", "teacher"))
        encoders = [
            Encoder(_under(weights, "backbone."), given.patch, given.grid, given.shape.heads, given.shape.depth, parts)
            for weights in (student, teacher)
        ]
        return encoders[0], encoders[1], _under(student, "head."), _under(teacher, "head.")

    def _target(self, token: str, logits: Tensor, temperature: float) -> list[Tensor]:
        """Centred and sharpened, view by view; the centre moves afterwards."""
        centre = self.centres[f"centre_{token}"]
        targets = F.softmax((logits - centre) / temperature, dim=-1).detach().chunk(GLOBALS)
        momentum = self.method_config.centre_momentum  # type: ignore[attr-defined]
        mean = torch.sum(logits, dim=0, keepdim=True) / len(logits)
        self.centres[f"centre_{token}"] = centre * momentum + mean * (1 - momentum)
        return list(targets)

    def _temperature(self, epoch: int, of: str = "teacher") -> float:
        given: Any = self.method_config
        return teacher_temperature(
            epoch, warmup=getattr(given, f"warmup_{of}_temp"), final=getattr(given, f"{of}_temp"),
            warmup_epochs=given.teacher_temp_warmup_epochs,
        )  # fmt: skip

    # -- methods -------------------------------------------------------------------------------------------------

    def _dino(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> Tensor:
        given: Any = self.method_config
        encoder, teacher, head, teacher_head = self._networks()
        wide, near = views["global"].flatten(0, 1), views["local"].flatten(0, 1)
        with torch.no_grad():
            taught = _prototypes(_mlp(teacher(wide)[-1][:, 0], teacher_head, "mlp."), teacher_head, "last_layer.")
        rows = torch.cat([encoder(wide, factors=drawn.wide)[-1][:, 0], encoder(near, factors=drawn.near)[-1][:, 0]])
        said = _prototypes(_mlp(rows, head, "mlp."), head, "last_layer.")
        pairs = _pairs(said, self._target("cls", taught, self._temperature(progress.epoch)), given.student_temp)
        return sum(pairs[1:], pairs[0]) / len(pairs)

    def _pass(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> Tensor:
        given: Any = self.method_config
        parts = range(1, given.parts + 1)
        encoder, teacher, head, teacher_head = self._networks(given.parts)
        wide, near = views["global"].flatten(0, 1), views["local"].flatten(0, 1)
        temperature, terms = self._temperature(progress.epoch), []
        with torch.no_grad():
            seen = teacher(wide, parts)[-1]
        whole = encoder(wide, parts, drawn.wide)[-1]
        local = encoder(near, given.areas, drawn.near)[-1]
        by_area = local[:, 1].chunk(given.parts)
        for place, token in enumerate(("cls", *(f"pt{part}" for part in parts))):
            mlp, last = f"mlp_{token}.", f"last_layer_{token}."
            with torch.no_grad():
                taught = _prototypes(_mlp(seen[:, place], teacher_head, mlp), teacher_head, last)
            rows = torch.cat([whole[:, place], local[:, 0] if place == 0 else by_area[place - 1]])
            said = _prototypes(_mlp(rows, head, mlp), head, last)
            terms += _pairs(said, self._target(token, taught, temperature), given.student_temp)
        return sum(terms[1:], terms[0]) / len(terms)

    def _personvit(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> Tensor:
        given: Any = self.method_config
        encoder, teacher, head, teacher_head = self._networks()
        wide, near = views["global"].flatten(0, 1), views["local"].flatten(0, 1)
        mask = views["mask"].flatten(2).flatten(0, 1)
        with torch.no_grad():
            taught = _prototypes(_mlp(teacher(wide)[-1], teacher_head, "mlp."), teacher_head, "last_layer.")
        said = _prototypes(_mlp(encoder(wide, factors=drawn.wide, mask=mask)[-1], head, "mlp."), head, "last_layer.")
        local = encoder(near, factors=drawn.near)[-1][:, 0]
        cls = torch.cat([said[:, 0], _prototypes(_mlp(local, head, "mlp."), head, "last_layer.")])
        pairs = _pairs(cls, self._target("cls", taught[:, 0], self._temperature(progress.epoch)), given.student_temp)
        temperature = self._temperature(progress.epoch, "teacher_patch")
        targets = F.softmax((taught[:, 1:] - self.centres["centre_patch"]) / temperature, dim=-1).detach()
        mean, momentum = taught[:, 1:].mean(dim=1).mean(dim=0, keepdim=True), given.patch_centre_momentum
        self.centres["centre_patch"] = self.centres["centre_patch"] * momentum + mean * (1 - momentum)
        of_view = [
            torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1)
            for target, view in zip(
                targets.chunk(GLOBALS), (said[:, 1:] / given.student_temp).chunk(GLOBALS), strict=True
            )
        ]
        patches = [
            (torch.sum(values * hidden, dim=-1) / hidden.sum(dim=-1).clamp(min=1.0)).mean()
            for values, hidden in zip(of_view, mask.float().chunk(GLOBALS), strict=True)
        ]
        cls_term, patch_term = sum(pairs[1:], pairs[0]) / len(pairs), (patches[0] + patches[1]) / GLOBALS
        return given.lambda_dino * cls_term + given.lambda_mim * patch_term

    def _personmae(self, views: Views, drawn: Drawn, progress: TrainingProgress) -> Tensor:
        given: Any = self.method_config
        encoder, teacher, head, _ = self._networks()
        region_a, region_b = views["region_a"][0], views["region_b"][0]
        mask = views["mask"][0].flatten(1)
        visible = (~mask).nonzero()[:, 1].view(len(mask), -1)
        with torch.no_grad():
            features = teacher(region_b)[-2][:, 1:]
        blocks = encoder(region_a, visible=visible, factors=drawn.wide)
        memories = blocks[given.pixel_memory], blocks[: encoder.depth][given.feature_memory]
        predicted = [
            self._decoded(_under(head, f"{name}."), blocks[-1], memory, code)
            for name, memory, code in zip(("pixel", "feature"), memories, drawn.codes, strict=True)
        ]
        patch, (rows, columns) = encoder.patch, encoder.grid
        pixels = region_b.reshape(len(region_b), 3, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1).flatten(3)
        pixels = pixels.flatten(1, 2)
        pixels = (pixels - pixels.mean(dim=-1, keepdim=True)) / (pixels.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        pixel_loss = (predicted[0] - pixels).square().mean()
        said, wanted = (F.layer_norm(values, values.shape[-1:], eps=1e-6) for values in (predicted[1], features))
        epochs = progress.total_steps / progress.epoch_steps
        factor = given.feature_weight * grown(progress.epoch, epochs=given.feature_growth * epochs)
        return pixel_loss + factor * (said - wanted).square().mean()

    def _decoded(self, weights: Weights, seen: Tensor, memory: Tensor, code: Tensor) -> Tensor:
        """A decoder's blocks over the seen tokens and a mask token for each place; its prediction for the places."""
        given: Any = self.method_config
        heads = given.decoder_heads or self.config.backbone.shape.heads
        tokens = torch.cat([_linear(seen, weights, "embed."), weights["mask_token"] + code], dim=1)
        for block in range(given.decoder_depth):
            name = f"blocks.{block}."
            calm = _layer_norm(tokens, weights, f"{name}norm1.")
            tokens = tokens + _cross(calm, calm, weights, f"{name}attn.", heads)
            kept = _layer_norm(memory, weights, f"{name}norm_memory.")
            tokens = tokens + _cross(
                _layer_norm(tokens, weights, f"{name}norm2."), kept, weights, f"{name}cross.", heads
            )
            hidden = F.gelu(_linear(_layer_norm(tokens, weights, f"{name}norm3."), weights, f"{name}mlp.fc1."))
            tokens = tokens + _linear(hidden, weights, f"{name}mlp.fc2.")
        return _linear(_layer_norm(tokens, weights, "norm.")[:, seen.shape[1] :], weights, "predict.")


def _cross(tokens: Tensor, memory: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    query = _linear(tokens, weights, f"{name}query.").unflatten(-1, (heads, -1)).transpose(1, 2)
    packed = _linear(memory, weights, f"{name}key_value.").unflatten(-1, (2, heads, -1))
    key, value = packed.permute(2, 0, 3, 1, 4)
    return _linear(_attention(query, key, value).transpose(1, 2).flatten(2), weights, f"{name}proj.")
