"""Files of weights that others wrote -> tensors and plain values. Nothing that a file says is ever run.

A .pth file is a pickle, a program that may name any Python function. Published training checkpoints name, beside
tensors, `argparse.Namespace` (their settings) and NumPy numbers (learning rates in the optimizer's groups). Here each
of these names stands for a harmless class of this file; any other name is refused before it is looked up.
"""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch

from datapipe.core.errors import DataError
from datapipe.formats.file_kinds import GZIP, TAR, kind_of_bytes

PICKLES = (b"PK\x03\x04", b"\x80\x02")
"""How a .pth file begins: an archive, or (before torch 1.6) a bare pickle of protocol 2."""
FILES = (".safetensors", ".pth", ".pt", ".pth.tar", ".pt.tar", ".tar", ".bin", ".ckpt", ".pkl", ".pyth")
"""How files of weights are called; deep-person-reid puts the epoch behind it: "model.pth.tar-60"."""
_EPOCH = re.compile(r"\.tar-\d+$")
_DAMAGE = (RuntimeError, MemoryError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
           OverflowError, struct.error, pickle.UnpicklingError)  # fmt: skip
"""What PyTorch's reader raises when a file is cut short or is no pickle of tensors."""
MOST_PROGRAM_BYTES = 64 << 20
"""Of the pickle within a .pth file, which says what its tensors are called: optimizers of many groups take 1 MB."""
MOST_VALUES, DEEPEST = 2_000_000, 100
"""Tensors, numbers and containers of a file, and how far they may lie within one another."""
MOST_TIMES, FREE_BYTES = 4, 64 << 20
"""How many times a file's own size its tensors may take: some share their numbers, as tied layers do."""
_NO_WEIGHTS = "an error page or a pointer in place of the file? look at its size"
_TO_STATE = "load it with the program that wrote it, and save model.state_dict() with torch.save"
_OF_OTHERS = {
    "JSON": "if it is the index of weights in several parts, save their tensors together in one file",
    "an HDF5 file": "weights of Keras or TensorFlow: convert them to a state_dict of PyTorch first",
    "a Python pickle": _TO_STATE,
    TAR: "weights of PyTorch before 0.4 are tars: " + _TO_STATE + "; else unpack it, and give the file within",
    GZIP: "unpack it, and give the file within",
}
"""What a file is, in words -> what to try."""
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


def is_weights_file(address: str) -> bool:
    """Whether an address is that of a file of weights, by its ending."""
    return address.lower().endswith(FILES) or _EPOCH.search(address) is not None


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
        kind = kind_of_bytes(data)
        raise DataError(f"this is neither a .safetensors nor a .pth file{f': {kind}' * bool(kind)}", where=where,
                        hint=_OF_OTHERS.get(kind, _NO_WEIGHTS))  # fmt: skip
    _refuse_expanding(content, len(data), where)
    if not isinstance(content, dict) or not content:
        raise DataError(f"the file holds no named tensors but a {type(content).__name__}", where=where,
                        hint="save the model's state_dict(), not the model")  # fmt: skip
    return {str(key): value for key, value in content.items()}


def _refuse_expanding(content: Any, size: int, where: str) -> None:
    """Raises DataError for tensors that take far more memory once somebody computes with them: a few bytes may be a
    tensor of any shape, or of many that are the same; and for ones without plain numbers."""
    total = 0
    for name, tensor in _tensors(content, where):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = "sparse" if tensor.layout is not torch.strided else "without numbers, or quantised"
            raise DataError(f"the tensor {name} is {kind}", where=where, hint="save plain tensors")
        total += tensor.numel() * tensor.element_size()
        if total > FREE_BYTES + MOST_TIMES * size:
            raise DataError(f"the tensors of the file take more than {total:,} bytes, the file has {size:,}: they are "
                            f"views of one another ({name})", where=where,
                            hint="do not trust it; if it is yours, save tensor.clone() of each")  # fmt: skip


def _tensors(content: Any, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors at any depth. Raises DataError for too many values, or where they nest too deeply,
    or lie within themselves."""
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    values = 0
    while waiting:
        name, value, depth = waiting.pop()
        values += 1
        if values > MOST_VALUES or depth > DEEPEST:
            raise DataError("the file holds too many values, or ones that lie within themselves", where=where,
                            hint="save the model's state_dict() alone")  # fmt: skip
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Arguments | Mapping):
            inside = vars(value) if isinstance(value, Arguments) else value
            waiting += [(str(key), inner, depth + 1) for key, inner in inside.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, inner, depth + 1) for inner in value]


def _safetensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, *_DAMAGE) as error:
        raise DataError(f"the file is damaged: {error}", where=where, hint="fetch it again") from error


def _other_zip(names: Sequence[str]) -> tuple[str, str] | None:
    """(what a zip of these members is, what to try) where it is nothing that torch.save wrote."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript model, which is a program", "torch.jit.load it where you trust it; torch.save its weights"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", "convert its arrays to the names and shapes of a PyTorch model first"
    return "a zip of other files", "unpack it, and give the file of weights within"


def _refuse_packed(data: bytes, where: str) -> None:
    """Raises DataError for an archive whose members are packed, or together larger than it: PyTorch makes room for what
    they are said to have, and writes them as they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, *_DAMAGE) as error:
        raise DataError(f"the file is damaged, or no file of weights: {error}", where=where,
                        hint="fetch it again, and compare its size or checksum") from error  # fmt: skip
    if other := _other_zip([one.filename for one in members]):
        raise DataError(f"this is no file of weights but {other[0]}", where=where, hint=other[1])
    packed = next((one.filename for one in members if one.compress_type != zipfile.ZIP_STORED), "")
    if packed or sum(one.file_size for one in members) > len(data):
        raise DataError(f"the members of the file are packed, or overlap ({packed or len(members)})", where=where,
                        hint="do not trust it; torch.save writes them as they are")  # fmt: skip
    for one in members:
        if one.filename.endswith("data.pkl") and one.file_size > MOST_PROGRAM_BYTES:
            raise DataError(f"the list of the file's tensors has {one.file_size:,} bytes", where=where,
                            hint="save the model's state_dict() alone")  # fmt: skip


def _pickle(data: bytes, where: str) -> Any:
    if data.startswith(PICKLES[0]):
        _refuse_packed(data, where)
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
