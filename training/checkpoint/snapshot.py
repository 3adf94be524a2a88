"""One rank's file of a checkpoint, put together in host memory that is used again for the next.

The file is safetensors, so that other programs can look into it; the copy from the device goes right to its place.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from training.checkpoint.digest import digest_of
from training.checkpoint.metadata import Form, Fragment, RankFile
from training.engine.state_fragments import Piece

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types as safetensors names them."""
TYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 8
"""Bytes: numbers begin at multiples of their size when the largest come first."""


class FragmentPlace(NamedTuple):
    """Where a piece lies in the file."""

    key: str
    start: int
    numel: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class RankSnapshot:
    """A rank's file in memory that the next one will overwrite; to be read after `wait`."""

    content: memoryview
    places: tuple[FragmentPlace, ...]
    tensors: dict[str, Form]
    arrived: torch.cuda.Event | None = None
    """Recorded behind the last copy from a GPU."""

    def wait(self) -> None:
        """Return once all of it is there: the thread that writes it waits, training does not."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def file(self, name: str) -> RankFile:
        """The snapshot's entry in the marker under this name. Reads all of it twice, for hashes of the fragments and
        the whole."""
        fragments = tuple(
            Fragment(place.key, place.start, place.numel, place.offset, digest_of(self._bytes(place)))
            for place in self.places
        )
        return RankFile(name, len(self.content), hashlib.sha256(self.content).hexdigest(), fragments)

    def _bytes(self, place: FragmentPlace) -> memoryview:
        return self.content[place.offset : place.offset + place.bytes]


class Snapshots:
    """Copies state from the device into host memory; page-locked for a GPU, allocated once for all saves.

    A GPU copies in the order of its computation, after what made the state and before what changes it, whichever
    operations those are; the host goes on to launch the next step meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, pieces: Sequence[Piece]) -> RankSnapshot:
        """The state as it is now, though it may still be arriving. It overwrites the part before."""
        ordered = sorted(pieces, key=lambda piece: -piece.values.element_size())
        head, places = _arrange(ordered)
        total = places[-1].offset + places[-1].bytes if places else len(head)
        memory = self._sized(total)
        memory[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for piece, place in zip(ordered, places, strict=True):
            target = memory[place.offset : place.offset + place.bytes].view(piece.values.dtype)
            target.copy_(piece.values, non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(torch.cuda.current_stream(self.device))
        tensors = {piece.key: Form(piece.shape, NAMES[piece.values.dtype]) for piece in ordered}
        return RankSnapshot(memoryview(memory.numpy().data), tuple(places), tensors, arrived)

    def _sized(self, total: int) -> torch.Tensor:
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # gives the old memory back first
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self._memory[:total]


def _arrange(pieces: Sequence[Piece]) -> tuple[bytes, list[FragmentPlace]]:
    """(what a safetensors file begins with, where each piece lies in the file)."""
    ends = [0, *accumulate(piece.bytes for piece in pieces)]
    table = {
        piece.key: {"dtype": NAMES[piece.values.dtype], "shape": [piece.values.numel()], "data_offsets": offsets}
        for piece, offsets in zip(pieces, pairwise(ends), strict=True)
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    places = [
        FragmentPlace(piece.key, piece.start, piece.values.numel(), len(head) + end, piece.bytes)
        for piece, end in zip(pieces, ends[:-1], strict=True)
    ]
    return head, places
