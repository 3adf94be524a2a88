"""What a stepper is: it takes micro-batches through forward and backward and makes one optimizer step of them.

Two of them keep the same promises: `plain.py` (any precision, the yardstick) and `deepspeed.py` (ZeRO). Gradients,
losses, sums and metrics are those of the whole global batch, on every rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.config import OptimisationConfig
from training.engine import optimisation
from training.engine.optimisation import ParameterGroup, StepSettings
from training.engine.world import World
from training.methods.base import Method, Outcome, Progress, Views
from training.weights import load_counted

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, as checkpoints name them."""


class Result(NamedTuple):
    """What one optimizer step found. Equal on all ranks."""

    loss: float
    sums: dict[str, Tensor]
    metrics: dict[str, float]
    norms: Tensor  # [parameters] gradient norms before clipping, in the order of `Stepper.names`
    finite: bool
    """False: loss or a gradient was not finite on some rank, and nothing was changed."""


class AdamState(NamedTuple):
    """One parameter's optimizer state, whole: what a checkpoint holds."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float


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
        self._totals: dict[str, Tensor] = {}
        self._frozen: set[str] = set()

    # -- what the loop calls -------------------------------------------------------------------------------------

    def apply(self, now: StepSettings, progress: Progress) -> None:
        """Set learning rate and decay of every group for the coming step."""
        self._frozen = {name for group in self.groups if group.frozen(progress) for name in group.names}
        optimisation.apply(self.groups, self._optimizer_groups(), now, progress)

    def forward(self, views: Views, progress: Progress) -> Outcome:
        """The outcome of one micro-batch; its loss, sums and metrics are added to the step's."""
        outcome = self._call(views, progress)
        self._collect(outcome, views["weight"])
        return outcome

    @abstractmethod
    def backward(self, outcome: Outcome, *, last: bool) -> None:
        """Add the gradients of one micro-batch. `last`: none follows before `step`."""

    def step(self) -> Result:
        """Clip, step, forget the gradients. A batch whose loss or gradients are not finite changes nothing."""
        loss, sums, metrics = self._gather()
        norms = self._norms()
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(norms).all())
        if finite:
            self._scale(self._factors(norms))
            self._advance()
        else:
            self._discard()
        return Result(float(loss), sums, metrics, norms, finite)

    def rehearse(self, views: Views, progress: Progress) -> None:
        """Forward and backward without a step; leaves no trace."""
        outcome = self._call(views, progress)
        self.backward(outcome, last=True)
        self._discard()
        self._totals.clear()

    @abstractmethod
    def optimizer_state(self) -> dict[str, AdamState]:
        """Whole moments per parameter name, on the CPU, on rank 0 (empty elsewhere). All ranks must call."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, AdamState]) -> None:
        """Put back what `optimizer_state` gave, at any world size. Called after the module's own tensors are loaded."""

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The part of each parameter of a submodule that this rank changes; the teacher follows the student there."""
        return dict(network.named_parameters())

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the method, whole. All ranks must call."""
        return dict(self.method.state_dict())

    def load_model_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Put back what `model_state` gave, by counted keys. Raises DataError naming what does not fit."""
        load_counted(self.method, state, where=where)

    # -- what a subclass knows -----------------------------------------------------------------------------------

    @abstractmethod
    def _call(self, views: Views, progress: Progress) -> Outcome: ...

    @abstractmethod
    def _optimizer_groups(self) -> list[dict]: ...

    @abstractmethod
    def _norms(self) -> Tensor:
        """[parameters] norms of the global batch's gradients, equal on every rank; one collective at most."""

    @abstractmethod
    def _scale(self, factors: Mapping[str, Tensor | float]) -> None:
        """Multiply gradients; names that are absent stay as they are."""

    @abstractmethod
    def _advance(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...

    # -- shared --------------------------------------------------------------------------------------------------

    def _collect(self, outcome: Outcome, weight: Tensor) -> None:
        found = {"loss": outcome.loss.detach()}
        found.update({f"sum/{name}": value.detach() for name, value in outcome.sums.items()})
        found.update({f"metric/{name}": (value * weight.to(value)).sum() for name, value in outcome.metrics.items()})
        for name, value in found.items():
            self._totals[name] = self._totals[name] + value if name in self._totals else value

    def _gather(self) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Everything collected since the last step, summed over ranks by one all-reduce."""
        dtype = self._totals["loss"].dtype
        flat = self.world.add(torch.cat([value.reshape(-1).to(dtype) for value in self._totals.values()]))
        parts = flat.split([value.numel() for value in self._totals.values()])
        whole = {
            name: part.reshape(value.shape)
            for (name, value), part in zip(self._totals.items(), parts, strict=True)
        }
        self._totals.clear()
        sums = {name.removeprefix("sum/"): value for name, value in whole.items() if name.startswith("sum/")}
        metrics = {
            name.removeprefix("metric/"): float(value) for name, value in whole.items() if name.startswith("metric/")
        }
        return whole["loss"], sums, metrics

    def _factors(self, norms: Tensor) -> dict[str, Tensor | float]:
        """What each gradient is multiplied by: the clip rule (DINO's `clip_gradients`, 1e-6 in the divisor)."""
        limit = self.config.clip_norm
        if self.config.clip == "none":
            return {}
        if self.config.clip == "global":
            whole = torch.linalg.vector_norm(norms)
            norms = whole.expand_as(norms)
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        return {name: factor for name, factor in zip(self.names, factors, strict=True) if bool(factor < 1)}


def load_adam(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, AdamState]
) -> None:
    """Give PyTorch's AdamW over whole parameters its state; a parameter that never stepped stays without."""
    for name, parameter in parameters.items():
        saved = state[name]
        if saved.step:
            optimizer.state[parameter] = {
                "step": torch.tensor(saved.step, dtype=torch.float32),
                "exp_avg": saved.exp_avg.to(parameter),
                "exp_avg_sq": saved.exp_avg_sq.to(parameter),
            }
