"""Streams and events of a GPU that is not there, and a search for races between them.

Operations are carried out at once, on the CPU. What a GPU might do in another order shows all the same: each stream and
the host has a vector clock, events and waits pass clocks on, and two operations on the same bytes, one of which writes,
must be ordered by them (Mattern, "Virtual time and global states of distributed systems", 1989).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[Any, int]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _join(clock: Clock, other: Clock) -> None:
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


class Stream:
    """A stream: work in the order in which it is given."""

    def __init__(self, streams: "Streams") -> None:
        self.streams, self.clock = streams, Clock()
        self.waits = 0

    def wait_event(self, event: "Event") -> None:
        self.waits += 1
        _join(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.waits += 1
        _join(self.clock, other.clock)

    def synchronize(self) -> None:
        self.streams.host_waits += 1
        _join(self.streams.host, self.clock)


class Event:
    """A place in a stream; everywhere until it is recorded."""

    def __init__(self) -> None:
        self.clock = Clock()

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


class Streams:
    """In the place of `torch.cuda`'s: the default stream, those that are made, and the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = Clock()
        self.host_waits = 0
        self.current = self.default = Stream(self)
        for name, stand_in in (("Stream", lambda *_, **__: Stream(self)), ("Event", Event), ("stream", self._within),
                               ("current_stream", lambda *_: self.current)):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class _Access(NamedTuple):
    """Bytes [first, end) that an operation reads or writes, at a time of a stream's clock."""

    first: int
    end: int
    writes: bool
    who: Any
    time: int
    name: str


class Races(TorchDispatchMode):
    """Finds operations that a GPU may carry out in the wrong order; `found` says which."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams
        self.found: list[str] = []
        self.copies: list[int] = []
        """Bytes of copies on other streams than the default one."""
        self._accesses: list[_Access] = []
        self._alive: list[Any] = []  # no memory is used again
        self._device: set[int] = set()
        """What is on the GPU: what is made on a stream, and what is computed with that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            return result  # a view
        given = [(leaf, argument.alias_info is not None and argument.alias_info.is_write)
                 for argument, values in zip(func._schema.arguments, args, strict=False)
                 for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]  # fmt: skip
        made = [(leaf, True) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        stream, name = self.streams.current, func._schema.name
        if stream is self.streams.default and not any(_memory(one) in self._device for one, _ in given):
            self._host_does([*given, *made], name)
            return result
        self._device.update(_memory(one) for one, _ in made)
        _join(stream.clock, self.streams.host)  # started after all that the host did before
        stream.clock[stream] = stream.clock.get(stream, 0) + 1
        for one, writes in [*given, *made]:
            self._note(one, writes, stream, stream.clock, name)
        if name == "aten::copy_" and stream is not self.streams.default:
            self.copies.append(args[0].numel() * args[0].element_size())
        return result

    def take(self, tensors: Iterable[Tensor]) -> None:
        """These are on the GPU."""
        self._device.update(map(_memory, tensors))

    def host_writes(self, values: np.ndarray) -> None:
        """The host is about to change these."""
        self._host_does([(torch.from_numpy(values), True)], "the host")

    def _host_does(self, tensors: list[tuple[Tensor, bool]], name: str) -> None:
        host = self.streams.host
        host["host"] = host.get("host", 0) + 1
        for one, writes in tensors:
            self._note(one, writes, "host", host, name)

    def _note(self, tensor: Tensor, writes: bool, who: Any, clock: Clock, name: str) -> None:
        self._alive.append(tensor)
        first = tensor.data_ptr()
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        access = _Access(first, first + span * tensor.element_size() if tensor.numel() else first, writes, who,
                         clock[who], name)  # fmt: skip
        for other in self._accesses:
            overlap = other.first < access.end and access.first < other.end
            if overlap and (other.writes or writes) and clock.get(other.who, 0) < other.time:
                self.found.append(f"{name} does not wait for {other.name}")
        self._accesses.append(access)
