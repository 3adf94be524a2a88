"""What `pip install` of a built wheel gives: the same commands, away from the working tree.

The wheel is built from the sdist, and goes into an environment of its own that has our dependencies, but not the
editable install of the working tree.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.golden import ROOT

PACKAGES = ("cluster", "datapipe", "training")
SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
WHERE = "import cluster, datapipe, training; print(*(module.__file__ for module in (cluster, datapipe, training)))"


def _run(*words: str, cwd: Path, **environment: str) -> str:
    """The output of a command, which has to end with 0; nothing tells it of the working tree."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(words, cwd=cwd, env=inherited | {"OMP_NUM_THREADS": "1"} | environment, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as a package registry would get it."""
    work = tmp_path_factory.mktemp("build")
    (work / "tree").mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, work / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "architecture", work / "tree" / "tests" / "architecture")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / "tree")
    _run(sys.executable, "-c", SDIST, str(work), cwd=work / "tree")
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(work / "sdist", filter="data")
    (source,) = (work / "sdist").iterdir()
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--wheel-dir", str(work), str(source), cwd=work)  # fmt: skip
    (made,) = work.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with the wheel. A .pth of another environment's, as of our editable install, is
    not heeded in a folder that is itself named by a .pth."""
    home = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=home)
    made = str(home / "bin" / "python")
    _run(sys.executable, "-m", "pip", "--python", made, "install", "--quiet", "--no-deps", "--no-index", str(wheel),
         cwd=home)  # fmt: skip
    (packages,) = home.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return made


@pytest.mark.slow
def test_wheel__holds_every_file_of_the_three_packages_but_their_pages_and_no_other(wheel: Path) -> None:
    files = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    tree = {str(path) for path in files
            if path.suffix != ".md" and not {"__pycache__", "docs"} & set(path.parts)}  # fmt: skip
    with zipfile.ZipFile(wheel) as held:
        assert {name for name in held.namelist() if ".dist-info/" not in name} == tree


@pytest.mark.slow
def test_wheel__the_three_commands_work_away_from_the_tree(python: str, tmp_path: Path) -> None:
    installed = Path(python).parents[1]
    assert all(Path(file).is_relative_to(installed) for file in _run(python, "-c", WHERE, cwd=tmp_path).split())
    for package in PACKAGES:
        assert "usage: " in _run(python, "-m", package, "--help", cwd=tmp_path)
    _run(python, "-m", "datapipe", "synth", "--out", "people", "--train-identities", "4", "--test-identities", "2",
         "--cameras", "2", "--images", "2", "--workers", "1", cwd=tmp_path)  # fmt: skip
    _run(python, "-m", "datapipe", "shard", "people/bounding_box_train", "--out", "shards", "--workers", "1",
         cwd=tmp_path)  # fmt: skip
    assert "does it fit?" in _run(python, "-m", "training", "pretrain", "pass_vits", "--dry-run", cwd=tmp_path)
    bare = {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or str(Path(sys.prefix) / "torch_extensions")
    said = _run(python, "-m", "cluster", "pretrain", "demo", "--stream.manifest", "shards", "--out", "run",
                "--optimisation.batch", "8", "--optimisation.epochs", "1", "--optimisation.warmup-epochs", "0.5",
                "--cluster.max-workers", "1", cwd=tmp_path, TORCH_EXTENSIONS_DIR=extensions, **bare)  # fmt: skip
    assert "complete: 2 steps" in said
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert told["git"] == "unknown" and told["versions"]["reid-pretraining"] != "absent"
    assert " complete " in _run(python, "-m", "cluster", "status", "run", cwd=tmp_path)
