"""The optimizers, and what each keeps of a parameter: these names are those of its state tensors in checkpoints.

To add one: make it in `make_optimizer`, and name its state tensors in `STATE_TENSORS`. They have the parameter's shape,
begin as zeros, and may be cut into pieces like the parameter itself.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.engine.settings import OptimisationConfig
from training.engine.state_fragments import Piece, whole

STATE_TENSORS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""Optimizer -> the tensors it keeps per parameter. A step count, where there is one, is kept beside them."""
COUNTING = (torch.optim.AdamW,)
"""Optimizers that count the steps of each parameter."""


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


def has_state(optimizer: Optimizer, tensor: Tensor) -> bool:
    """Has the optimizer stepped this tensor since its state was last zeroed?"""
    state = optimizer.state.get(tensor, {})
    if any(state.get(name) is None for name in state_tensors(optimizer)):
        return False
    return not isinstance(optimizer, COUNTING) or bool(state["step"] > 0)


def step_count(optimizer: Optimizer, tensor: Tensor) -> float:
    """Steps of this tensor that the optimizer counted; 0 where it does not count."""
    return float(optimizer.state.get(tensor, {}).get("step", 0.0))


def zero_state(optimizer: Optimizer, tensor: Tensor, step: float | None) -> None:
    """State of zeros and this step count for a tensor that the optimizer steps, in the memory that its state has
    already. None: as before the first step."""
    if step is None and not optimizer.state.get(tensor):
        return
    state: dict[str, Any] = optimizer.state[tensor]
    for name in state_tensors(optimizer):
        if state.get(name) is None:
            state[name] = torch.zeros_like(tensor)
        else:
            state[name].zero_()
    if isinstance(optimizer, COUNTING):
        state["step"] = torch.tensor(step or 0.0, dtype=torch.float32)


def whole_steps(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Step counts of the parameters, stepped as wholes, that the optimizer has has_state with."""
    return {name: step_count(optimizer, value) for name, value in parameters.items() if has_state(optimizer, value)}


def whole_pieces(optimizer: Optimizer, parameters: Mapping[str, Tensor], names: Collection[str]) -> list[Piece]:
    """The state of those of the parameters, stepped as wholes, that are named."""
    return [
        whole(f"{key}/{name}", optimizer.state[parameter][key])
        for name, parameter in parameters.items()
        if name in names
        for key in state_tensors(optimizer)
    ]
