"""Files of weights that others wrote -> tensors and plain values. Nothing that a file says is ever run.

A .pth file is a pickle, a program that may name any Python function. Published training checkpoints name, beside
tensors, `argparse.Namespace` (their settings) and NumPy numbers (learning rates in the optimizer's groups). Here each
of these names stands for a harmless class of this file; any other name is refused before it is looked up.
"""

import io
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

import safetensors
import safetensors.torch
import torch

from datapipe.core.errors import DataError

PICKLES = (b"PK\x03\x04", b"\x80\x02")
"""How a .pth file begins: an archive, or (before torch 1.6) a bare pickle of protocol 2."""
FILES = (".safetensors", ".pth", ".pt", ".pth.tar")
"""How files of weights are called."""
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError,
           struct.error, pickle.UnpicklingError)  # fmt: skip
"""What PyTorch's reader raises when a file is cut short or is no pickle of tensors."""
_FORMATS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}
"""NumPy's names of number formats -> those of `struct`."""


class Arguments:
    """Stands for `argparse.Namespace`: whatever attributes the file gives it."""


class _Format:
    """Stands for `numpy.dtype`."""

    def __init__(self, name: str, *rest: Any) -> None:
        del rest
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of no interest for one number of a known format."""


def _number(kind: Any, data: bytes) -> float | int | bool:
    """Stands for NumPy's maker of single numbers."""
    if not isinstance(kind, _Format) or kind.name not in _FORMATS:
        raise ValueError(f"a number of an unknown format: {getattr(kind, 'name', kind)}")
    number: float | int | bool = struct.unpack(_FORMATS[kind.name], data)[0]
    return number


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Arguments, "argparse.Namespace"),
    (_Format, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_number, "numpy._core.multiarray.scalar"),  # NumPy 2
]
"""All that a file may name beside PyTorch's own tensors and containers, and what it gets."""


def read_weights(data: bytes, *, where: str) -> dict[str, Any]:
    """What a .safetensors, .pth or .pt file holds at its top: names -> tensors, nested dicts, numbers, `Arguments`.

    The kind of file is told by its first bytes. Raises DataError where it is damaged, of another kind, or names
    anything that is not `ALLOWED`.
    """
    if data.startswith(PICKLES):
        content = _pickle(data, where)
    elif data[8:9] == b"{":
        content = _safetensors(data, where)
    else:
        raise DataError("this is neither a .safetensors nor a .pth file", where=where,
                        hint="an error page or a pointer in place of the file? look at its size")  # fmt: skip
    if not isinstance(content, dict) or not content:
        raise DataError(f"the file holds no named tensors but a {type(content).__name__}", where=where,
                        hint="save the model's state_dict(), not the model")  # fmt: skip
    return {str(key): value for key, value in content.items()}


def _safetensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"the file is damaged: {error}", where=where, hint="fetch it again") from error


def _pickle(data: bytes, where: str) -> Any:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            what = f"the file names `{refused.group(1)}`, which no file of weights needs; nothing was run"
            hint = "do not trust it; if it is yours, save state_dict()s and plain settings only"
            raise DataError(what, where=where, hint=hint) from error
        raise DataError(f"the file is damaged, or no file of weights: {_reason(error)}", where=where,
                        hint="fetch it again, and compare its size or checksum") from error  # fmt: skip


def _reason(error: Exception) -> str:
    """PyTorch's reason in one line, without its advice to read the file unsafely."""
    text = str(error) or type(error).__name__
    stated = text.partition("WeightsUnpickler error:")[2].strip() or text
    return stated.partition("\n")[0].partition(". ")[0]
