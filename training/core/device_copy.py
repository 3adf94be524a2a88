"""From the host's memory to a device without making the host wait."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: where tensors of any type may begin."""


def to_device(values: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on the device, as `dtype` if given, cast on the host.

    To a GPU through pinned memory, beside the computation: the host goes on at once, and may overwrite `values` at
    once. Copies from ordinary memory wait for all work that the GPU was given before. To the CPU nothing is copied.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    dtype = dtype or tensor.dtype
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def table(make: Callable[..., Tensor], *arguments: Hashable, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`make(*arguments)` on the device, made and copied once; not to be written to."""
    with torch.inference_mode(False):  # autograd may keep it, whoever was first to ask
        return to_device(make(*arguments), device, dtype)


class _Place(NamedTuple):
    """Where a tensor lies in a block of bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * int(np.prod(self.shape))

    def of(self, block: Tensor) -> Tensor:
        """The tensor, in the memory of the block."""
        return block[self.start : self.end].view(self.dtype).view(self.shape)


class DeviceSlot:
    """A block of a GPU's memory that copies arrive in, and the events that say when it may be read and overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.small: dict[str, _Place] = {}
        self.large: dict[str, _Place] = {}
        self.arrived = torch.cuda.Event()
        """Recorded behind the copies into the slot."""
        self.read = torch.cuda.Event()
        """Recorded behind the last computation that reads the slot."""


class CopyStream:
    """Copies to a GPU on a stream of their own, into two slots by turns: one is filled while the other is read.

    All waiting is the GPU's: the computation waits for copies into the slot that it reads, copies into a slot for the
    computation that read it last. Only `settle` makes the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):  # whose memory the slots are: it is used again in this stream's order
            self._slots = cycle([DeviceSlot(device), DeviceSlot(device)])

    def begin(self, small: Mapping[str, Tensor], large: Mapping[str, Tensor]) -> DeviceSlot:
        """Start the copies into the slot whose turn it is; what was copied there the turn before last is lost.

        `small`: many of a few bytes, which go through pinned memory by one copy, and which the host may overwrite at
        once. `large`: one copy each where they are in one piece, else one for each row of the first axis; they must be
        pinned to be copied beside the computation, and stay as they are until `settle`.
        """
        slot = next(self._slots)
        small_places, end = _arranged(small, 0)
        packed = torch.empty(end, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for name, place in small_places.items():
            place.of(packed).copy_(small[name])
        large_places, end = _arranged(large, end)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.read)
            if slot.memory.numel() < end:
                slot.memory = torch.empty(end, dtype=torch.uint8, device=self.device)
            slot.memory[: packed.numel()].copy_(packed, non_blocking=True)
            for name, place in large_places.items():
                _copy(large[name], place.of(slot.memory))
            slot.arrived.record(self._stream)
        slot.small, slot.large = small_places, large_places
        return slot

    @contextmanager
    def reading(self, slot: DeviceSlot) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What `begin` copied there: small tensors, which are the caller's, and large ones, which are lent for the work
        that is started within the context."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(slot.arrived)
        end = max((place.end for place in slot.small.values()), default=0)
        small = slot.memory[:end].clone()
        yield ({name: place.of(small) for name, place in slot.small.items()},
               {name: place.of(slot.memory) for name, place in slot.large.items()})  # fmt: skip
        slot.read.record(stream)

    def settle(self) -> None:
        """Wait until all copies that were begun are done: the host may overwrite what they come from."""
        self._stream.synchronize()


def _arranged(tensors: Mapping[str, Tensor], start: int) -> tuple[dict[str, _Place], int]:
    """Places of tensors one behind the other, from a byte on; the byte behind the last."""
    places = {}
    for name, tensor in tensors.items():
        places[name] = _Place(-(-start // ALIGNMENT) * ALIGNMENT, tensor.dtype, tuple(tensor.shape))
        start = places[name].end
    return places, start


def _copy(source: Tensor, target: Tensor) -> None:
    """Copies of pieces of memory: others would be put together by the host first, in ordinary memory."""
    pieces = [(source, target)] if source.is_contiguous() else zip(source, target, strict=True)
    for one, into in pieces:
        into.copy_(one, non_blocking=True)
