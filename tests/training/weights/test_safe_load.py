import gzip
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from datapipe.core.errors import DataError
from tests.training.weights.published_files import arguments, saved
from training.weights.safe_load import Arguments, read_weights


class Runs:
    """Unpickled by an ordinary reader, it calls a function with an argument."""

    def __init__(self, call: Any, argument: str) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (self.argument,)


@pytest.mark.parametrize("old", [False, True])
def test_read__tensors_settings_and_numbers(old: bool) -> None:
    numbers = {"f8": np.float64(0.1), "f4": np.float32(2.5), "i8": np.int64(-3), "b1": np.bool_(True)}
    content = {"teacher": {"a": torch.arange(3.0)}, "args": arguments(), "optimizer": numbers}
    found = read_weights(saved(content, old=old), where="x")
    assert torch.equal(found["teacher"]["a"], torch.arange(3.0))
    assert found["optimizer"] == {"f8": 0.1, "f4": 2.5, "i8": -3, "b1": True}
    assert isinstance(found["args"], Arguments) and vars(found["args"]) == vars(arguments())


def test_read__safetensors() -> None:
    state = {"a": torch.arange(3.0)}
    assert torch.equal(read_weights(safetensors.torch.save(state), where="x")["a"], state["a"])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("call", "told"), [
    (os.system, r"posix\.system"), (eval, "eval"), (exec, "exec"), (np.load, r"numpy\.load"),
])  # fmt: skip
def test_read__what_would_run_is_refused_and_does_not_run(call: Any, told: str, old: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = f"touch {trace}" if call is os.system else f"open({str(trace)!r}, 'w')"
    content = {"teacher": {"a": torch.zeros(2)}, "args": arguments(), "loss": Runs(call, command)}
    with pytest.raises(DataError, match=f"names `{told}`.*nothing was run"):
        read_weights(saved(content, old=old), where="x")
    assert not trace.exists()
    if call in (os.system, eval):
        pickle.loads(pickle.dumps(content["loss"]))
        assert trace.exists(), "the bait must be real"


def test_read__a_whole_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"names `torch\.nn\.modules\.linear\.Linear`"):
        read_weights(saved({"model": torch.nn.Linear(2, 2)}), where="x")


def test_read__other_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="unknown format: c16"):
        read_weights(saved({"a": np.complex128(1)}), where="x")


@pytest.mark.parametrize("data", [
    b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", pickle.dumps({"a": 1}),
])  # fmt: skip
def test_read__another_kind_of_file(data: bytes) -> None:
    with pytest.raises(DataError, match=r"neither a \.safetensors nor a \.pth file"):
        read_weights(data, where="x")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, torch.zeros(2)])
def test_read__no_named_tensors(content: Any) -> None:
    with pytest.raises(DataError, match="holds no named tensors"):
        read_weights(saved(content), where="x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
def test_read__damage_is_a_clear_error(kind: str) -> None:
    """Cut anywhere, it is refused; with bytes changed it is refused or read, and nothing else happens."""
    state = {"a": torch.arange(40.0), "b": torch.ones(3)}
    content = {"teacher": state, "args": arguments(), "lr": np.float64(0.1)}
    data = safetensors.torch.save(state) if kind == "safetensors" else saved(content, old=kind == "old")
    draw = random.Random(0)
    for _ in range(60):
        with pytest.raises(DataError):
            read_weights(data[: draw.randrange(len(data))], where="x")
        changed = bytearray(data)
        for _ in range(3):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        try:
            read_weights(bytes(changed), where="x")
        except DataError as error:
            assert "weights_only" not in str(error)


def zipped(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 40)
    return sink.getvalue()


def npz() -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **{"params/Transformer/encoderblock_0": np.zeros(3)})
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "told", "hint"),
    [
        (b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "JSON", "several parts"),
        (b"<!DOCTYPE html><html>", "an HTML page", "error page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5", "Keras"),
        (pickle.dumps({"a": [1.0]}, protocol=4), "a Python pickle", "state_dict"),
        (gzip.compress(saved({"a": torch.zeros(2)})), "gzip", "unpack"),
        (npz(), r"a NumPy archive \(.npz\)", "convert"),
        (zipped("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"), "TorchScript", "torch.jit.load"),
        (zipped("weights/vit.pth", "weights/readme.txt"), "a zip of other files", "unpack"),
    ],
    ids=["index", "html", "lfs", "hdf5", "pickle", "gzip", "npz", "torchscript", "zip"],
)
def test_read__files_of_other_kinds_are_named(data: bytes, told: str, hint: str) -> None:
    with pytest.raises(DataError, match=told) as raised:
        read_weights(data, where="x")
    assert hint in raised.value.hint
