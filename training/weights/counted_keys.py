"""Weights fit where every key is there, none is left over, and each has its shape; else an error names the keys."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from datapipe.core.errors import DataError

SHOWN = 5
"""Keys of each kind that an error names; the others are counted."""


def load_counted(
    module: nn.Module, state: Mapping[str, Tensor], *, leave_out: Collection[str] = (), where: str = ""
) -> int:
    """Load every tensor of `state` but those named in `leave_out`, and fill every one of the module's. Their number.

    What is missing, left over or of another shape is a DataError that names the keys; nothing is loaded then.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    given = {name: tensor for name, tensor in state.items() if name not in leave_out}
    check_counted(shapes, given, absent=sorted(set(leave_out) - state.keys()), where=where)
    module.load_state_dict(given)
    return len(given)


class Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def check_counted(
    own: Mapping[str, Sequence[int]], given: Mapping[str, Shaped], *, absent: Sequence[str] = (), where: str = ""
) -> None:
    """Raise a DataError that names what is missing, left over, or of another shape than `own` says.

    `absent`: names that were to be left out, but are not there to leave out.
    """
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(own[name])}"
        for name in own.keys() & given.keys()
        if tuple(own[name]) != tuple(given[name].shape)
    ]
    faults = {
        "missing": sorted(own.keys() - given.keys()),
        "left over": sorted(given.keys() - own.keys()),
        "of another shape": sorted(shapes),
        "to leave out, but absent": absent,
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {first_few(keys)}" for kind, keys in faults.items() if keys)
        raise DataError(f"the weights do not fit ({len(given)} for {len(own)}); {listed}", where=where,
                        hint="check that file and architecture belong together")  # fmt: skip


def first_few(keys: Sequence[str]) -> str:
    """The first keys, and how many there are where that is not all."""
    rest = f", ... ({len(keys)} in all)" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest
