"""How the gradients of all ranks are added up: in which number format, and by which collective.

    plain       one all-reduce of all gradients
    ZeRO 0      DeepSpeed's all-reduce, by buckets
    ZeRO 1      a reduce-scatter for each group of parameters: a rank receives the part that it steps, and no other
    ZeRO 2, 3   by buckets during the backward pass; 3 by DeepSpeed's reduce-scatter, 2 by its reductions to owners
    ZeRO 1, 2   on GPUs, beside the backward pass, by `training/engine/overlapped_reduction.py`: reductions to owners

DeepSpeed 0.19.8 calls it reduce-scatter in stage 1, too, and all-reduces every bucket, of which each rank then keeps
its part: twice the bytes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from datapipe.core.errors import ConfigError
from training.core.collectives import all_reduce, reduce_scatter

Reduction = Literal["fp32", "bf16"]
"""Format in which gradients travel and are added up. Before and after they are float32 in either case."""
BYTES: dict[Reduction, int] = {"fp32": 4, "bf16": 2}
"""Of a number on its way."""
OWNERS = 64
"""Most ranks with which buckets are reduced to the ranks that own them. Beyond, pieces are so small that their number,
not their bytes, takes the time: in stage 2 buckets are all-reduced, in stage 1 scattered after the backward pass."""


def travelling(values: Tensor, reduction: Reduction) -> Tensor:
    """A copy in the format that travels where that is another, else the values themselves."""
    return values.to(torch.bfloat16) if reduction == "bf16" else values


def refuse_unlowered(parameters: Sequence[Tensor], reduction: Reduction) -> None:
    """Raises ConfigError where gradients are of a precision that bf16 would make pointless."""
    if reduction == "bf16" and any(value.dtype == torch.float64 for value in parameters):
        raise ConfigError("gradients in float64 are not reduced in bf16", where="optimisation.reduction",
                          hint='reduction = "fp32" leaves them as they are')  # fmt: skip


def sum_over_ranks(gradients: Sequence[Tensor], reduction: Reduction) -> None:
    """Replace whole gradients by their sums over all ranks, by one all-reduce."""
    flat = all_reduce(torch.cat([travelling(gradient.reshape(-1), reduction) for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def scatter_in(zero: Any, reduction: Reduction, *, rank: int, world: int, bucket: int) -> None:
    """Have DeepSpeed's optimizer of stage 1 average its gradients by reduce-scatters of up to `bucket` numbers."""
    zero.reduce_gradients = partial(_scatter, zero, reduction, rank, world, bucket)
    zero.reduce_bucket_size = 1  # nothing is collected in DeepSpeed's own buffer, which it would set up at each step


def _scatter(
    zero: Any, reduction: Reduction, rank: int, world: int, bucket: int, pipeline_parallel: bool = False
) -> None:
    """In place of `reduce_gradients`: leaves the average over ranks in this rank's part of `grad`, and lets DeepSpeed
    take it from there. A group lies in one flat row, parameter after parameter, of which rank r steps the r-th part;
    the last one is padded. What is sent at once is the same stretch of every part."""
    del pipeline_parallel
    for index, group in enumerate(zero.bit16_groups):
        row, size = _Row(group), int(zero.partition_size[index])
        width = max(1, min(size, bucket // world))
        for start in range(0, size, width):
            count = min(width, size - start)
            stretches = [row.stretch(one * size + start, count) for one in range(world)]
            sent = torch.cat([piece for stretch in stretches for piece in stretch]).div_(world)
            part = reduce_scatter(travelling(sent, reduction))
            own = stretches[rank]
            for piece, average in zip(own, part.split([len(piece) for piece in own]), strict=True):
                piece.copy_(average)
        for parameter in zero.params_not_in_partition[index]:
            parameter.grad = None
    zero.overlapping_partition_gradients_reduce_epilogue()


class _Row:
    """The gradients of a group of parameters, one after the other, as if they were one tensor."""

    def __init__(self, group: Sequence[Tensor]) -> None:
        self._flat = []
        for parameter in group:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = gradient
            self._flat.append(gradient.view(-1))
        self._ends = list(accumulate(len(flat) for flat in self._flat))

    def stretch(self, start: int, count: int) -> list[Tensor]:
        """So many numbers from a place on, as views; behind the last gradient zeros."""
        pieces: list[Tensor] = []
        end = start + count
        for index in range(bisect_right(self._ends, start), len(self._flat)):
            if start == end:
                return pieces
            within = start - self._ends[index] + len(self._flat[index])
            taken = min(len(self._flat[index]) - within, end - start)
            pieces.append(self._flat[index].narrow(0, within, taken))
            start += taken
        return [*pieces, self._flat[0].new_zeros(end - start)] if start < end else pieces
