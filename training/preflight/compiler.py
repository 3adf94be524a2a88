"""Whether torch.compile can work on this machine, found out before the first step."""

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import torch

from datapipe.core.errors import ConfigError

WHERE = "backbone.compile_blocks"
WITHOUT = "or backbone.compile_blocks = false"


def refuse_without_compiler(device: torch.device) -> None:
    """Raises ConfigError where a compiler, Python's headers, or a folder for what is compiled is missing: TorchInductor
    needs a C++ compiler for the CPU, Triton a C compiler for a GPU."""
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    chosen = os.environ.get(variable, "")
    if not any(map(shutil.which, (chosen,) if chosen else names)):
        looked_for = chosen or ", ".join(names)
        raise ConfigError(f"torch.compile needs a compiler, and there is none: {looked_for}", where=WHERE,
                          hint=f"install g++ (Debian: build-essential), or set {variable}; {WITHOUT}")  # fmt: skip
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        raise ConfigError(f"torch.compile needs Python's headers, and there is no {headers}", where=WHERE,
                          hint=f"install them (Debian: python3-dev); {WITHOUT}")  # fmt: skip
    _refuse_folder()


def _refuse_folder() -> None:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # makes the folder

        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            problem = "programs in it may not be run" if os.statvfs(folder).f_flag & os.ST_NOEXEC else ""
    except OSError as error:
        folder, problem = given or str(error.filename or ""), error.strerror or str(error)
    if problem:
        raise ConfigError(f"torch.compile needs a folder for what it compiles: {problem}", where=folder,
                          hint=f"TORCHINDUCTOR_CACHE_DIR=/another/folder; {WITHOUT}")  # fmt: skip
