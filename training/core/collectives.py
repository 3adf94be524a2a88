"""Sums and rows of all ranks, on every rank: for losses and statistics of a whole batch. With one process they are its
own."""

from typing import Any

import torch
from torch import Tensor, distributed


def all_reduce(values: Tensor, operation: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
    """Reduced over ranks, in place; without gradient."""
    if _several():
        distributed.all_reduce(values, op=operation)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's values, with gradient."""
    if not _several():
        return values
    total: Tensor = _Sum.apply(values)
    return total


def gathered(rows: Tensor) -> Tensor:
    """[B, ...] of every rank -> [ranks * B, ...], rank after rank, with gradient. B is the same on all of them."""
    if not _several():
        return rows
    whole: Tensor = _Gather.apply(rows)
    return whole


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: what every rank's loss owes to this rank's summand."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].clone())


class _Gather(torch.autograd.Function):
    """The backward pass sums what every rank's loss owes to this rank's rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        whole = all_reduce(gradients[0].clone())
        return whole.split(context.count)[distributed.get_rank()]


def _several() -> bool:
    """Is there a process group?"""
    return distributed.is_available() and distributed.is_initialized()
