"""ZeRO 1 and 2 on GPUs: gradients are averaged while the backward pass goes on, each on the rank that steps it.

A group of parameters lies in one flat row, of which rank r steps the r-th part. Rows are cut into buckets, none of
which crosses the border of a part. As soon as all gradients of a bucket are there it is averaged onto its owner, on a
stream of its own; no host waits. All ranks do so in one order, that in which a backward pass is expected to come by,
whatever comes first: collectives that ranks begin in different orders wait for each other for ever.

DeepSpeed's `overlap_comm` (0.19.8) has the host wait for the GPU once a backward pass and once for each owner of a
bucket, or sends all of a bucket to all ranks, which is twice the bytes.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.core.collectives import reduce_to
from training.core.world import World
from training.engine.reduction import OWNERS, Reduction, travelling


class _Piece(NamedTuple):
    """A stretch of a gradient: the parameter's number in the order of the forward pass, and where in it."""

    number: int
    start: int
    size: int


class _Bucket(NamedTuple):
    """What is averaged at once, all of it onto one rank."""

    owner: int
    pieces: tuple[_Piece, ...]
    numbers: frozenset[int]
    """Of the parameters."""

    @classmethod
    def of(cls, owner: int, pieces: Sequence[_Piece]) -> "_Bucket":
        return cls(owner, tuple(pieces), frozenset(piece.number for piece in pieces))


def overlaps(world: World, stage: int) -> bool:
    """Are gradients added up during the backward pass by this module?"""
    return stage in (1, 2) and 1 < world.size <= OWNERS and world.device.type == "cuda"


def buckets(rows: Sequence[Sequence[tuple[int, int]]], parts: Sequence[int], most: int) -> list[_Bucket]:
    """Rows of (parameter's number, its size), cut at every multiple of the row's part and into at most `most` numbers;
    first those whose gradients are expected first, which are those used last in the forward pass."""
    found: list[_Bucket] = []
    for row, part in zip(rows, parts, strict=True):
        place, pieces, room = 0, list[_Piece](), min(most, part)
        for number, size in row:
            start = 0
            while start < size:
                count = min(size - start, room)
                pieces.append(_Piece(number, start, count))
                start, place, room = start + count, place + count, room - count
                if not room:
                    found.append(_Bucket.of((place - 1) // part, pieces))
                    pieces, room = [], min(most, part - place % part)
        if pieces:
            found.append(_Bucket.of((place - 1) // part, pieces))
    return sorted(found, key=lambda bucket: (-min(bucket.numbers), bucket.owner, bucket.pieces))


class OverlappedReduction:
    """Takes DeepSpeed's place in adding up gradients, of its optimizer `zero` of stage 1 or 2."""

    def __init__(
        self, zero: Any, parameters: Sequence[Tensor], reduction: Reduction, world: World, *, bucket: int
    ) -> None:
        """`parameters`: in the order of the forward pass. `bucket`: most numbers averaged at once."""
        self._zero, self._parameters, self._reduction, self._world = zero, list(parameters), reduction, world
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        rows = [[(numbers[id(one)], one.numel()) for one in group] for group in zero.bit16_groups]
        self._buckets = buckets(rows, [int(size) for size in zero.partition_size], bucket)
        self._uses = Counter(number for one in self._buckets for number in one.numbers)
        self._own = {number for one in self._buckets if one.owner == world.rank for number in one.numbers}
        self._streams = _Streams(world.device) if world.device.type == "cuda" else None
        self._armed, self._begun = False, 0
        self._arrived: set[int] = set()
        self._unsent: Counter[int] = Counter()
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrive, number))
        self._take_over()

    def _take_over(self) -> None:
        """DeepSpeed's own buckets get nothing, and are as small as can be; the rest of its work follows `finish`."""
        zero = self._zero
        zero.reduce_bucket_size = 1
        zero.process_gradients = lambda parameter, group: zero.setup_buckets()
        self._rest = zero.overlapping_partition_gradients_reduce_epilogue
        zero.overlapping_partition_gradients_reduce_epilogue = self.finish
        zero.reduce_gradients = lambda pipeline_parallel=False: self.finish()

    def arm(self, *, last: bool) -> None:
        """A backward pass follows. In stage 1 gradients stay whole until the `last` one of a step."""
        self._armed, self._begun = last or self._zero.partition_gradients, 0
        self._arrived.clear()
        self._unsent = self._uses.copy()

    def _arrive(self, number: int, _: Tensor) -> None:
        """The gradient of a parameter is complete; start the buckets that only waited for it, in their order."""
        if not self._armed:
            return
        assert number not in self._arrived, "a gradient grew after it was there: it may have been sent already"
        self._arrived.add(number)
        if self._streams is not None:
            self._streams.note()
        while self._begun < len(self._buckets) and self._buckets[self._begun].numbers <= self._arrived:
            self._start()

    def finish(self) -> None:
        """Start what is left, such as parameters without a gradient; leave the averages in this rank's part of
        gradients, and let DeepSpeed take them from there."""
        if self._armed:
            while self._begun < len(self._buckets):
                self._start()
            if self._streams is not None:
                self._streams.join()
            self._armed = False
        self._rest()

    def _start(self) -> None:
        bucket = self._buckets[self._begun]
        self._begun += 1
        gradients = [self._flat(piece.number).narrow(0, piece.start, piece.size) for piece in bucket.pieces]
        with contextlib.nullcontext() if self._streams is None else self._streams.beside():
            average = torch.cat(gradients).div_(self._world.size)
            average = reduce_to(travelling(average, self._reduction), bucket.owner, self._zero.dp_process_group)
            if bucket.owner == self._world.rank:
                for gradient, part in zip(gradients, average.split([len(one) for one in gradients]), strict=True):
                    gradient.copy_(part)
        self._unsent.subtract(bucket.numbers)
        self._let_go(number for number in bucket.numbers - self._own if not self._unsent[number])

    def _let_go(self, numbers: Iterable[int]) -> None:
        """Give back gradients of which all has been sent, and nothing is this rank's."""
        for number in numbers:
            gradient, self._parameters[number].grad = self._parameters[number].grad, None
            if self._streams is not None and gradient is not None:
                gradient.record_stream(self._streams.own)

    def _flat(self, number: int) -> Tensor:
        """A parameter's gradient, zeros where it has none."""
        parameter = self._parameters[number]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        return parameter.grad.view(-1)


class _Streams:
    """The stream that gradients are averaged on, and those of the backward pass that they come from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.own = torch.cuda.Stream(device, priority=-1)
        self._producers: set[torch.cuda.Stream] = set()

    def note(self) -> None:
        """The present stream has made a gradient: of compiled blocks each may have one of its own."""
        self._producers.add(torch.cuda.current_stream(self._device))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the own stream, behind all that has been started so far."""
        self.note()
        for stream in self._producers:
            self.own.wait_stream(stream)
        with torch.cuda.stream(self.own):
            yield

    def join(self) -> None:
        """Let the present stream wait for the own one."""
        torch.cuda.current_stream(self._device).wait_stream(self.own)
        self._producers.clear()
