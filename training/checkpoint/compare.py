"""How two checkpoints differ, part by part, one tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from training.checkpoint.reader import Reader

FACTS = ("step", "samples", "seed", "manifest", "loss_scale", "steps")
"""What the markers say that decides how training goes on."""


@dataclass
class TensorDifference:
    """How far all tensors of one part differ: student, teacher, other state of the method, or an optimizer's."""

    part: str
    tensors: int = 0
    numbers: int = 0
    unequal: int = 0
    """Numbers that differ in any bit."""
    largest: float = 0.0
    """Largest absolute difference; not a number where only one of the two is."""
    where: str = ""
    """The tensor with the largest."""

    def add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Take in a tensor of the part."""
        self.tensors += 1
        self.numbers += left.numel()
        same = (left == right) | (left.isnan() & right.isnan())
        if bool(same.all()):
            return
        self.unequal += int((~same).sum())
        apart = (left[~same].double() - right[~same].double()).abs()
        largest = float("nan") if bool(apart.isnan().any()) else float(apart.max())
        if not self.where or not largest <= self.largest:
            self.largest, self.where = largest, name


@dataclass(frozen=True)
class CheckpointComparison:
    """All that two checkpoints have in common, and what only one has."""

    facts: list[str]
    """What the markers say differently, in words."""
    alone: list[str]
    """Tensors that one of them lacks, or has in another shape, in words."""
    parts: list[TensorDifference]

    @property
    def equal(self) -> bool:
        """Would training go on alike from both?"""
        return not self.facts and not self.alone and not any(part.unequal for part in self.parts)


def compare(left: Reader, right: Reader) -> CheckpointComparison:
    """Read both, tensor by tensor. Raises DataError where one is damaged."""
    parts: dict[str, TensorDifference] = {}
    ours, theirs = left.marker.tensors, right.marker.tensors
    for key in (key for key in ours if key in theirs and ours[key].shape == theirs[key].shape):
        part = _part(key)
        parts.setdefault(part, TensorDifference(part)).add(key, left.whole(key), right.whole(key))
    return CheckpointComparison(list(_facts(left, right)), list(_alone(left, right)), list(parts.values()))


def _part(key: str) -> str:
    kind, _, name = key.partition("/")
    network = name.partition(".")[0]
    if kind != "model":
        return kind
    return network if network in ("student", "teacher") else "other state"


def _facts(left: Reader, right: Reader) -> Iterator[str]:
    for name in FACTS:
        one, other = getattr(left.marker, name), getattr(right.marker, name)
        if name == "steps" and one != other:
            changed = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            yield f"the optimizer's step counts of {len(changed)} parameters"
        elif one != other:
            yield f"{name}: {one} and {other}"


def _alone(left: Reader, right: Reader) -> Iterator[str]:
    ours, theirs = left.marker.tensors, right.marker.tensors
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in theirs or key not in ours:
            yield f"{key}: only in the {'second' if key in theirs else 'first'}"
        elif ours[key].shape != theirs[key].shape:
            yield f"{key}: {ours[key].shape} and {theirs[key].shape}"


def table(comparison: CheckpointComparison) -> list[str]:
    """The comparison as lines for a person."""
    lines = [f"{'part':<16}{'tensors':>8}{'numbers':>14}{'unequal':>14}{'largest':>12}  where"]
    lines += [
        f"{part.part:<16}{part.tensors:>8,}{part.numbers:>14,}{part.unequal:>14,}{part.largest:>12.3g}  {part.where}"
        for part in comparison.parts
    ]
    return [*lines, *comparison.facts, *comparison.alone, "equal" if comparison.equal else "different"]
