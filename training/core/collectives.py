"""All collectives on tensors: sums and rows of all ranks, on every rank. With one process they are its own.

Those on picklable values are methods of `training.core.world.World`."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed

from training.core.device_copy import to_device


def all_reduce(values: Tensor, operation: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
    """Reduce over ranks, in place, without gradient. The order of additions is fixed for a number of ranks (rings
    of gloo and NCCL)."""
    if _several():
        distributed.all_reduce(values, op=operation)
    return values


def reduce_scatter(values: Tensor) -> Tensor:
    """[ranks * N] of every rank -> [N]: the sum over ranks of this rank's part, the r-th for rank r."""
    if not _several():
        return values
    part = values.new_empty(len(values) // distributed.get_world_size())
    distributed.reduce_scatter_tensor(part, values)
    return part


def reduce_to(values: Tensor, rank: int, group: Any = None) -> Tensor:
    """The sum over ranks on one of them, in place; what is left on the others is no sum. `group`: of all ranks."""
    if _several():
        distributed.reduce(values, dst=rank, group=group)
    return values


class LateSum:
    """The sum over ranks of numbers in the host's memory, on its way beside all else. On GPUs on a stream of its own:
    neither does the computation wait for the numbers, nor they for the computation."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        """Begin. `values` are written to."""
        self._values = values
        self._work: distributed.Work | None = None
        self._there: torch.cuda.Event | None = None
        if _several() and device.type == "cuda":
            self._on_stream(device)
        elif _several():
            self._work = distributed.all_reduce(values, async_op=True)

    def _on_stream(self, device: torch.device) -> None:
        stream = _side_stream(device)
        with torch.cuda.stream(stream):
            values = to_device(self._values, device)
            distributed.all_reduce(values, async_op=True).wait()  # the stream waits
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(stream)

    def wait(self) -> Tensor:
        """The sum, in the host's memory. Waits for ranks that lag behind, and for nothing of a GPU's computation."""
        if self._work is not None:
            self._work.wait()
        if self._there is not None:
            self._there.synchronize()
        return self._values


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
    """Is there a process group of several?"""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
