"""Which parameters are treated alike, and what their settings are at each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.core import schedules
from training.engine.settings import OptimisationConfig
from training.methods.base import Method, TrainingProgress


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share decay, learning-rate factor and release epoch."""

    names: tuple[str, ...]
    decay: bool
    lr_factor: float
    release_epoch: int

    def frozen(self, progress: TrainingProgress) -> bool:
        """Before its release a group has no gradient: no step, no decay, no moments, no step count."""
        return progress.epoch < self.release_epoch


class StepSettings(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    ema: float
    base_lr: float = 0.0
    """The part of `lr` that the factors of parameter groups do not multiply."""

    def lr_of(self, factor: float) -> float:
        """The learning rate of a group."""
        return self.base_lr + factor * (self.lr - self.base_lr)


def group_parameters(method: Method, *, layer_decay: float = 1.0) -> tuple[ParameterGroup, ...]:
    """Group the trainable parameters by role, in the order of their first appearance.

    With layer decay d the learning rate of depth i is multiplied by d^(deepest - i): the patch embedding learns
    slowest, what comes after the blocks at the full rate (BEiT, MAE fine-tuning).
    """
    roles = method.roles()
    deepest = max(role.depth for role in roles.values())
    members: dict[tuple[bool, float, int], list[str]] = {}
    for name, role in roles.items():
        factor = role.lr_factor * layer_decay ** (deepest - role.depth)
        members.setdefault((role.decay, factor, role.release_epoch), []).append(name)
    return tuple(
        ParameterGroup(tuple(names), decay, lr_factor, release_epoch)
        for (decay, lr_factor, release_epoch), names in members.items()
    )


def settings_at(config: OptimisationConfig, progress: TrainingProgress) -> StepSettings:
    """Learning rate, weight decay and teacher momentum of a step."""
    decay = schedules.warmup_cosine(
        progress.step, base=config.weight_decay, final=config.final_weight_decay, total_steps=progress.total_steps,
    )  # fmt: skip
    lr, base_lr = _lr(config, progress)
    return StepSettings(lr, decay, _ema(config, progress), base_lr)


def _lr(config: OptimisationConfig, progress: TrainingProgress) -> tuple[float, float]:
    """(learning rate, the part of it that is the same for all groups)."""
    if config.schedule == "step":
        return schedules.warmup_cosine(
            progress.step, base=config.lr, final=config.final_lr, start=config.warmup_lr,
            total_steps=progress.total_steps, warmup_steps=config.warmup_epochs * progress.epoch_steps,
        ), 0.0  # fmt: skip
    if config.schedule == "staircase":
        steps = progress.epoch // config.staircase_epochs
        return config.lr * config.staircase_factor**steps * _risen(config, progress), 0.0
    start, peak, final = schedules.epochwise(progress.epoch, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
    common = start * config.warmup_lr + final * config.final_lr
    return common + peak * config.lr, common


def _risen(config: OptimisationConfig, progress: TrainingProgress) -> float:
    """Factor of the learning rate in a linear warm-up from `warmup_lr`; 1 after it."""
    warmup = config.warmup_epochs * progress.epoch_steps
    start = config.warmup_lr / config.lr
    return start + (1 - start) * (progress.step + 1) / warmup if progress.step < warmup else 1.0


def _ema(config: OptimisationConfig, progress: TrainingProgress) -> float:
    if config.ema_points:
        return schedules.along(config.ema_points, progress.epoch)
    return schedules.warmup_cosine(
        progress.step, base=config.ema, final=config.final_ema, total_steps=progress.total_steps, warmup_steps=0
    )


def apply(
    groups: Sequence[ParameterGroup], targets: Sequence[dict], now: StepSettings, progress: TrainingProgress
) -> None:
    """Write the settings of a step into the optimizer's parameter groups, which are in the order of `groups`."""
    for group, target in zip(groups, targets, strict=True):
        target["lr"] = 0.0 if group.frozen(progress) else now.lr_of(group.lr_factor)
        target["weight_decay"] = now.weight_decay if group.decay else 0.0
