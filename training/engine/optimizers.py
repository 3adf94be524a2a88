"""The optimizers, and what each keeps of a parameter: these names are those of its state tensors in checkpoints.

To add one: make it in `make_optimizer`, and name its state tensors in `STATE_TENSORS`. They have the parameter's shape,
begin as zeros, and may be cut into pieces like the parameter itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.config import OptimisationConfig

STATE_TENSORS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""Optimizer -> the tensors it keeps per parameter. A step count, where there is one, is kept beside them."""
COUNTING = (torch.optim.AdamW,)
"""Optimizers that count the steps of each parameter."""


class ParameterState(NamedTuple):
    """What an optimizer keeps of one parameter, whole."""

    tensors: dict[str, Tensor]
    """Empty before the first step."""
    step: float
    """Steps that were counted; 0 too for an optimizer that does not count."""


def make_optimizer(config: OptimisationConfig, groups: Sequence[Sequence[Tensor]]) -> Optimizer:
    """The recipe's optimizer over groups of parameters, in their order. Learning rate and decay are set at each step
    (`optimisation.apply`)."""
    members = [{"params": list(group)} for group in groups]
    if config.optimizer == "sgd":
        return torch.optim.SGD(members, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(members, betas=config.betas, eps=config.eps)


def state_tensors(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors that it keeps per parameter."""
    return STATE_TENSORS[type(optimizer)]


def step_count(optimizer: Optimizer, tensor: Tensor) -> float:
    """Steps of this tensor that the optimizer counted."""
    return float(optimizer.state.get(tensor, {}).get("step", 0.0))


def set_state(optimizer: Optimizer, tensor: Tensor, tensors: Mapping[str, Tensor], step: float) -> None:
    """Let the optimizer go on from this state of a tensor that it steps."""
    state: dict[str, Any] = dict(tensors)
    if isinstance(optimizer, COUNTING):
        state["step"] = torch.tensor(step, dtype=torch.float32)
    optimizer.state[tensor] = state


def whole_state(optimizer: Optimizer, parameter: Tensor) -> ParameterState:
    """What the optimizer keeps of a parameter that it steps as a whole, on the CPU."""
    state = optimizer.state.get(parameter, {})
    held = {name: state[name].cpu() for name in state_tensors(optimizer) if state.get(name) is not None}
    return ParameterState(held, step_count(optimizer, parameter))


def load_whole(optimizer: Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, ParameterState]) -> None:
    """Give an optimizer over whole parameters its state; a parameter that never stepped stays without."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if state[name].tensors:
            tensors = {key: value.to(parameter) for key, value in state[name].tensors.items()}
            set_state(optimizer, parameter, tensors, state[name].step)
