"""What torch.compile needs of a machine is missed before the first step."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from datapipe.core.errors import ConfigError
from training.preflight.compiler import refuse_without_compiler

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has all that it takes, in this folder."""
    for name in ("bin/g++", "bin/gcc", "include/Python.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "include"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(("device", "name", "variable"), [(CPU, "g++", "CXX"), (GPU, "gcc", "CC")])
def test_compiler__is_looked_for_by_device(
    machine: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str, variable: str
) -> None:
    refuse_without_compiler(device)
    (machine / "bin" / name).rename(machine / "bin" / "other")
    with pytest.raises(ConfigError, match=rf"there is none: {name.replace('+', '.')}") as missed:
        refuse_without_compiler(device)
    assert variable in missed.value.hint
    monkeypatch.setenv(variable, "other")
    refuse_without_compiler(device)


def test_compiler__headers_and_folder_are_missed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(machine / "bin" / "gcc" / "below"))
    with pytest.raises(ConfigError, match="a folder for what it compiles: Not a directory") as missed:
        refuse_without_compiler(CPU)
    assert missed.value.where == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    (machine / "include" / "Python.h").unlink()
    with pytest.raises(ConfigError, match="there is no .*Python.h"):
        refuse_without_compiler(CPU)
