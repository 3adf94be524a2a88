"""The yardstick: PyTorch's optimizers, gradients of all ranks summed by one all-reduce, no DeepSpeed."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from training.core.world import World
from training.engine import reduction
from training.engine.optimizers import make_optimizer, whole_pieces, whole_steps, zero_state
from training.engine.param_groups import ParameterGroup
from training.engine.settings import OptimisationConfig
from training.engine.state_fragments import Piece
from training.engine.stepper import Stepper
from training.methods.base import Method, Outcome, TrainingProgress, Views


class PlainStepper(Stepper):
    """Whole parameters, gradients and moments on every rank, in the precision of the module (float64 too)."""

    def __init__(
        self, method: Method, groups: Sequence[ParameterGroup], config: OptimisationConfig, world: World
    ) -> None:
        super().__init__(method, groups, config, world)
        reduction.refuse_unlowered(list(self.parameters.values()), config.reduction)
        self.optimizer = make_optimizer(config, self.grouped())

    def _call(self, views: Views, progress: TrainingProgress) -> Outcome:
        return self.method(views, progress)

    def backward(self, outcome: Outcome, *, last: bool) -> None:
        (outcome.loss * self._multiplier).backward()
        if last:
            self._sum_over_ranks()

    def _sum_over_ranks(self) -> None:
        if self.world.size == 1:
            return
        gradients = [self._gradient(value) for value in self.parameters.values()]
        reduction.sum_over_ranks(gradients, self.config.reduction)

    @staticmethod
    def _gradient(parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _optimizer_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def _norms(self) -> Tensor:
        return torch.stack(torch._foreach_norm([self._gradient(value) for value in self.parameters.values()]))

    def _multiply(self, factors: Mapping[str, float]) -> None:
        if factors:
            torch._foreach_mul_([self._gradient(self.parameters[name]) for name in factors], list(factors.values()))

    def _advance(self) -> None:
        for name in self._frozen:
            self.parameters[name].grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _counts(self) -> dict[str, float]:
        return whole_steps(self.optimizer, self.parameters)

    def _state_pieces(self, names: Collection[str]) -> list[Piece]:
        return whole_pieces(self.optimizer, self.parameters, names)

    def _begin(self, steps: Mapping[str, float]) -> None:
        for name, parameter in self.parameters.items():
            zero_state(self.optimizer, parameter, steps.get(name))
