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


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one pass over the memory, by PyTorch's fused kernels, with the same bits however parameters are cut or
    laid end to end.

    On a CPU the kernel takes WHOLE numbers at a time and rounds the few that are left at the end of a tensor otherwise.
    So what is left goes through it in a copy of whole length: then its results are those of the unfused loop, in a
    seventh of the time.
    """

    WHOLE = 64
    """A multiple of what any of its instruction sets takes at a time."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As in AdamW."""
        del closure
        for group in self.param_groups:
            rows = [self._row(value) for value in group["params"] if value.grad is not None]
            if not rows:
                continue
            torch._foreach_add_([row[4] for row in rows], 1)
            whole, ends = self._divided(rows)
            padded = [(*(self._padded(end) for end in row[:4]), row[4]) for row in ends]
            values, gradients, firsts, seconds, counts = map(list, zip(*whole, *padded, strict=True))
            torch._fused_adamw_(
                values, gradients, firsts, seconds, [], counts, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False,
            )  # fmt: skip
            for row, copies in zip(ends, padded, strict=True):
                for end, copy in zip((row[0], *row[2:4]), (copies[0], *copies[2:4]), strict=True):
                    end.copy_(copy[: end.numel()])

    def _row(self, parameter: Tensor) -> list[Tensor]:
        """(parameter, gradient, moments, count), state of zeros where there is none."""
        if not self.state[parameter]:
            zero_state(self, parameter, 0.0)
        state = self.state[parameter]
        assert parameter.grad is not None
        return [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]

    @classmethod
    def _divided(cls, rows: Sequence[Sequence[Tensor]]) -> tuple[list[Sequence[Tensor]], list[list[Tensor]]]:
        """(parameter, gradient, moments, count) of what the kernel takes as it is, and of the ends that are left."""
        whole: list[Sequence[Tensor]] = []
        ends: list[list[Tensor]] = []
        for row in rows:
            left = row[0].numel() % cls.WHOLE
            if row[0].is_cuda or not left:
                whole.append(row)
                continue
            flat = [row[0].view(-1), row[1].reshape(-1), row[2].view(-1), row[3].view(-1)]
            if len(flat[0]) > left:
                whole.append([*(tensor[:-left] for tensor in flat), row[4]])
            ends.append([*(tensor[-left:] for tensor in flat), row[4]])
        return whole, ends

    @classmethod
    def _padded(cls, end: Tensor) -> Tensor:
        return torch.cat([end, end.new_zeros(cls.WHOLE - end.numel())])


STATE_TENSORS: dict[type[Optimizer], tuple[str, ...]] = {
    FusedAdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""Optimizer -> the tensors it keeps per parameter. A step count, where there is one, is kept beside them."""
COUNTING = (FusedAdamW,)
"""Optimizers that count the steps of each parameter."""


def make_optimizer(config: OptimisationConfig, groups: Sequence[Sequence[Tensor]]) -> Optimizer:
    """The recipe's optimizer over groups of parameters, in their order. Learning rate and decay are set at each step
    (`optimisation.apply`)."""
    members = [{"params": list(group)} for group in groups]
    if config.optimizer == "sgd":
        return torch.optim.SGD(members, lr=config.lr, momentum=config.momentum)
    return FusedAdamW(members, betas=config.betas, eps=config.eps, fused=True)


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
        # where the fused kernel reads it
        state["step"] = torch.full((), step or 0.0, dtype=torch.float32, device=tensor.device)


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
