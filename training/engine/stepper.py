"""What a stepper is: it takes micro-batches through forward and backward and makes one optimizer step of them.

Two of them keep the same promises: `plain.py` (any precision, the yardstick) and `deepspeed.py` (ZeRO). Gradients,
losses, sums and metrics are those of the whole global batch, on every rank.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from training.core.collectives import all_reduce
from training.core.precision import casts_kept
from training.core.world import World
from training.engine import param_groups
from training.engine.loss_scaling import first_scale
from training.engine.param_groups import ParameterGroup, StepSettings
from training.engine.settings import OptimisationConfig
from training.engine.state_fragments import Piece, whole
from training.methods.base import Method, Outcome, TrainingProgress, Views


class Result(NamedTuple):
    """What one optimizer step found. Equal on all ranks."""

    loss: float
    sums: dict[str, Tensor]
    metrics: dict[str, float]
    norms: Tensor  # [parameters], on the host: gradient norms before clipping, in the order of `Stepper.names`
    finite: bool
    """False: loss or a gradient was not finite on some rank, and nothing was changed."""
    overflow: bool
    """True: gradients alone were not finite, and the loss scale may be why. It is halved; do the batch again."""


class Stepper(ABC):
    """Forward, backward, step, state. Subclasses say where gradients live."""

    def __init__(
        self, method: Method, groups: Sequence[ParameterGroup], config: OptimisationConfig, world: World
    ) -> None:
        self.method, self.groups, self.config, self.world = method, tuple(groups), config, world
        self.parameters = {name: value for name, value in method.named_parameters() if value.requires_grad}
        listed = [name for group in self.groups for name in group.names]
        if sorted(listed) != sorted(self.parameters):
            wrong = set(listed) ^ set(self.parameters)
            raise AssertionError(f"roles() and the trainable parameters differ: {sorted(wrong)}")
        self.names = list(self.parameters)
        self.scale = first_scale(config.precision)
        """Of the loss, in float16 runs. Equal on all ranks; part of a checkpoint."""
        self._totals: dict[str, Tensor] = {}
        self._metrics: tuple[str, ...] = ()
        """Names of the metrics that were collected last."""
        self._frozen: set[str] = set()

    def grouped(self) -> list[list[Tensor]]:
        """The parameters of each group."""
        return [[self.parameters[name] for name in group.names] for group in self.groups]

    # -- what the loop calls -------------------------------------------------------------------------------------

    def apply(self, now: StepSettings, progress: TrainingProgress) -> None:
        """Set learning rate and decay of every group for the coming step."""
        self._frozen = {name for group in self.groups if group.frozen(progress) for name in group.names}
        param_groups.apply(self.groups, self._optimizer_groups(), now, progress)

    def accumulation(self) -> AbstractContextManager[None]:
        """Around forward and backward of all micro-batches of a step: weights are lowered once for all of them."""
        return casts_kept(self.world.device)

    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """The outcome of one micro-batch; its loss, sums and metrics are added to the step's."""
        outcome = self._call(views, progress)
        self._collect(outcome, views["weight"])
        return outcome

    @abstractmethod
    def backward(self, outcome: Outcome, *, last: bool) -> None:
        """Add the gradients of one micro-batch. `last`: none follows before `step`."""

    def step(self) -> Result:
        """Unscale, clip, step, forget the gradients. A batch whose loss or gradients are not finite changes nothing but
        the loss scale."""
        loss, sums, metrics, norms = self._read(*self._gather(), self._norms())
        loss_finite = math.isfinite(loss)
        finite = loss_finite and bool(torch.isfinite(norms).all())
        overflow = loss_finite and not finite and self.scale is not None and not self.scale.smallest
        if finite:
            self._multiply(self._factors(norms))
            self._advance()
        else:
            self._discard()
        if self.scale is not None:
            metrics["scale"] = self.scale.value
            self._rescale(finite, overflow)
        return Result(loss, sums, metrics, norms, finite, overflow)

    def rehearse(self, views: Views, progress: TrainingProgress) -> None:
        """Forward and backward without a step; leaves no trace."""
        outcome = self._call(views, progress)
        self.backward(outcome, last=True)
        self._discard()
        self._totals.clear()

    def steps(self) -> dict[str, float]:
        """Parameter -> steps that its optimizer counted, of those that it has begun with; without those frozen now,
        whose state means nothing."""
        return {name: count for name, count in self._counts().items() if name not in self._frozen}

    def pieces(self, steps: Mapping[str, float]) -> list[Piece]:
        """The state as this rank holds it: parameters and buffers of the method, and what the optimizer keeps of the
        parameters in `steps`."""
        return self._model_pieces() + self._state_pieces(steps)

    def restore(self, steps: Mapping[str, float], fill: Callable[[Sequence[Piece]], None]) -> None:
        """Take over a state in the memory of the present one. `fill` writes the values of pieces; what `steps` does not
        have is as before its first step. No collective."""
        fill(self._model_pieces())
        self._begin(steps)
        fill(self._state_pieces(steps))

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The part of each parameter of a submodule that this rank changes; the teacher follows the student there."""
        return dict(network.named_parameters())

    # -- what a subclass knows -----------------------------------------------------------------------------------

    @abstractmethod
    def _call(self, views: Views, progress: TrainingProgress) -> Outcome: ...

    @abstractmethod
    def _optimizer_groups(self) -> list[dict]: ...

    @abstractmethod
    def _norms(self) -> Tensor:
        """[parameters] norms of the global batch's gradients, equal on every rank; one collective at most."""

    @abstractmethod
    def _multiply(self, factors: Mapping[str, float]) -> None:
        """Multiply gradients; names that are absent stay as they are."""

    @abstractmethod
    def _counts(self) -> dict[str, float]:
        """Step counts of the parameters that the optimizer has begun with, frozen ones too."""

    def _model_pieces(self) -> list[Piece]:
        return [whole(f"model/{name}", value) for name, value in self.method.state_dict().items()]

    @abstractmethod
    def _state_pieces(self, names: Collection[str]) -> list[Piece]:
        """What this rank's optimizer keeps of the parameters in `names`, with all of which it has begun."""

    @abstractmethod
    def _begin(self, steps: Mapping[str, float]) -> None:
        """Take over the parameters that the module has now. Optimizer state of zeros, with the given step counts."""

    @abstractmethod
    def _advance(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...

    # -- shared --------------------------------------------------------------------------------------------------

    @property
    def _multiplier(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        return 1.0 if self.scale is None else self.scale.value

    def _rescale(self, finite: bool, overflow: bool) -> None:
        assert self.scale is not None
        if finite:
            self.scale = self.scale.after_step()
        elif overflow:
            self.scale = self.scale.after_overflow()

    def _collect(self, outcome: Outcome, weight: Tensor) -> None:
        loss = outcome.loss.detach()
        self._add("loss", loss)
        for name, value in outcome.sums.items():
            self._add(f"sum/{name}", value.detach())
        self._metrics = tuple(outcome.metrics)
        if outcome.metrics:
            rows = torch.stack([value.to(loss.dtype) for value in outcome.metrics.values()])
            self._add("metrics", rows @ weight.to(loss.dtype))

    def _add(self, name: str, value: Tensor) -> None:
        self._totals[name] = self._totals[name] + value if name in self._totals else value

    def _gather(self) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, the sums and the metrics collected since the last step, of all ranks by one all-reduce."""
        dtype = self._totals["loss"].dtype
        flat = all_reduce(torch.cat([value.reshape(-1).to(dtype) for value in self._totals.values()]))
        parts = flat.split([value.numel() for value in self._totals.values()])
        whole = {
            name: part.reshape(value.shape) for (name, value), part in zip(self._totals.items(), parts, strict=True)
        }
        self._totals.clear()
        sums = {name.removeprefix("sum/"): value for name, value in whole.items() if name.startswith("sum/")}
        return whole["loss"], sums, whole.get("metrics", flat[:0])

    def _read(
        self, loss: Tensor, sums: dict[str, Tensor], metrics: Tensor, norms: Tensor
    ) -> tuple[float, dict[str, Tensor], dict[str, float], Tensor]:
        """Loss, metrics and norms without the loss scale in the host's memory: all that a step waits for the device
        for. Sums stay where they are."""
        first, *rest = torch.cat([loss[None], metrics, norms]).tolist()  # in the finest of their formats
        count = len(self._metrics)
        named = dict(zip(self._metrics, rest[:count], strict=True))
        return first, sums, named, torch.tensor(rest[count:], dtype=norms.dtype) / self._multiplier

    def _factors(self, norms: Tensor) -> dict[str, float]:
        """What each gradient is multiplied by, where that is not 1: the clip rule, over the loss scale."""
        factors = [factor / self._multiplier for factor in self._clip(norms).tolist()]
        return {name: factor for name, factor in zip(self.names, factors, strict=True) if factor != 1}

    def _clip(self, norms: Tensor) -> Tensor:
        """[parameters] factors of at most 1 (DINO's `clip_gradients`, 1e-6 in the divisor)."""
        if self.config.clip == "none":
            return torch.ones_like(norms)
        if self.config.clip == "global":
            norms = torch.linalg.vector_norm(norms).expand_as(norms)
        return (self.config.clip_norm / (norms + 1e-6)).clamp(max=1.0)
