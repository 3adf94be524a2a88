"""What all ranks hold, on every rank, with gradient: for losses that compare the images of a whole batch."""

from typing import Any

import torch
from torch import Tensor, distributed


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
        whole = gradients[0].clone()
        distributed.all_reduce(whole)
        return whole.split(context.count)[distributed.get_rank()]


def gathered(rows: Tensor) -> Tensor:
    """[B, ...] of every rank -> [ranks * B, ...], rank after rank. B is the same on all of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    whole: Tensor = _Gather.apply(rows)
    return whole
