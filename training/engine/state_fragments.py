"""State as it is saved and restored: runs of numbers of named tensors, in the memory that training uses."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """A run of consecutive numbers of a named tensor that this rank holds. Read to save it, written to restore it."""

    key: str
    """Kind, a slash, and the name of the parameter or buffer: model/student.head.0.weight, exp_avg/student..."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Place of the first number in the whole tensor, flattened."""
    values: Tensor  # [numbers], a view
    shared: bool
    """Do all ranks hold this very piece?"""

    @property
    def end(self) -> int:
        return self.start + self.values.numel()

    @property
    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


def whole(key: str, tensor: Tensor) -> Piece:
    """A tensor that every rank holds from its first number to its last."""
    return Piece(key, tuple(tensor.shape), 0, tensor.detach().view(-1), shared=True)


def divide(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """What a rank saves: the pieces that it alone holds, and its share of those that all hold.

    Those are laid end to end and cut into `world` stretches of equal bytes: a function of names and sizes alone, so
    that the ranks agree without asking one another.
    """
    total = sum(piece.bytes for piece in pieces if piece.shared)
    edges = (total * rank // world, total * (rank + 1) // world)
    mine, before = [], 0
    for piece in pieces:
        if piece.shared:
            size, numbers = piece.values.element_size(), piece.values.numel()
            first, last = (min(max(-((before - edge) // size), 0), numbers) for edge in edges)
            before += piece.bytes
            piece = piece._replace(start=piece.start + first, values=piece.values[first:last])
        if piece.values.numel():
            mine.append(piece)
    return mine
