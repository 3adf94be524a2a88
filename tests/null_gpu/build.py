"""Builds the null GPU's libraries beside the PyTorch that is installed. Needs gcc and nm; of CUDA nothing but the
headers that PyTorch's wheels bring."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = Path(torch.__file__).parents[1]
INCLUDES = ("nvidia/cu13/include", "nvidia/nccl/include")
CUDA_USERS = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "torch_nvshmem")
"""PyTorch's libraries that call the runtime, cuBLAS and NCCL."""
RUNTIME = ("cuda", "__cuda", "cublas", "nccl")
"""How the names begin that these libraries want."""


def missing() -> str:
    """What the build lacks here; empty where nothing is missing."""
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    files = [name for name in (*INCLUDES, "torch/lib/libtorch_cuda.so") if not (PACKAGES / name).exists()]
    return ", ".join([*tools, *files])


def environment(*, devices: int = 1, memory_gb: int = 80) -> dict[str, str]:
    """Variables with which a new process of this Python has GPUs; builds the libraries where they are not there yet."""
    folder = built()
    return {
        **os.environ, "LD_PRELOAD": str(folder / "libnull.so"), "LD_LIBRARY_PATH": str(folder), "NULL_GPU": "1",
        "NULLCUDA_DEVICES": str(devices), "NULLCUDA_GB": str(memory_gb), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def built(cache: Path = ROOT / ".bench") -> Path:
    """The folder with libnull.so and a libcuda.so.1; made once for each version of the source and of PyTorch."""
    source = HERE / "null.c"
    key = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes() + version("torch").encode()).hexdigest()[:12]
    folder = cache / f"null_gpu_{key}_{sys.version_info.major}{sys.version_info.minor}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        _build(source, Path(made))
        try:
            Path(made).rename(folder)  # whole or absent, whoever else builds it at the same time
        except OSError:
            assert folder.exists()
        Path(made).mkdir(exist_ok=True)
    return folder


def _build(source: Path, folder: Path) -> None:
    paths = [f"-I{PACKAGES / name}" for name in INCLUDES]
    paths += ["-idirafter", str(PACKAGES / "triton/backends/nvidia/include")]
    _compile(["-O1", *paths, "-c", str(source), "-o", "null.o"], folder)
    defined = _symbols(["--defined-only", "null.o"], folder)
    libraries = [PACKAGES / f"torch/lib/lib{name}.so" for name in CUDA_USERS]
    wanted = {name for path in libraries if path.exists() for name in _wanted(path, folder) if name.startswith(RUNTIME)}
    _stubs(sorted(wanted - defined), folder / "rest.c")
    _compile(["null.o", "rest.c", "-o", "libnull.so", "-lpthread"], folder)
    driver = [name for name in _wanted(PACKAGES / "torch/lib/libcaffe2_nvrtc.so", folder) if name.startswith("cu")]
    _stubs(sorted(driver), folder / "driver.c")
    _compile(["-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"], folder)
    for name in ("null.o", "rest.c", "driver.c"):
        (folder / name).unlink()


def _stubs(names: Iterable[str], path: Path) -> None:
    """Functions of these names that return 0: success."""
    path.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))


def _wanted(library: Path, folder: Path) -> set[str]:
    return _symbols(["--dynamic", "--undefined-only", str(library)], folder)


def _symbols(words: Sequence[str], folder: Path) -> set[str]:
    found = subprocess.run(["nm", *words], cwd=folder, check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in found.splitlines() if line.strip()}


def _compile(words: Sequence[str], folder: Path) -> None:
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", *words], cwd=folder, check=True, capture_output=True)
