"""What `pip install` of a built wheel gives: the same commands, away from the working tree.

The wheel is built from the sdist, and goes into an environment of its own that has our dependencies, but not the
editable install of the working tree.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.dataset.manifest import Manifest
from tests.cluster.ray_head import ray_head, without_ray
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
    """The interpreter of an environment with the wheel."""
    return environment(tmp_path_factory.mktemp("installed"), wheel)


def environment(home: Path, *wheels: Path) -> str:
    """The interpreter of a new environment with our dependencies and these wheels. A .pth of another environment's, as
    of our editable install, is not heeded in a folder that is itself named by a .pth."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=home)
    made = str(home / "bin" / "python")
    for wheel in wheels:
        _run(sys.executable, "-m", "pip", "--python", made, "install", "--quiet", "--no-deps", "--no-index", str(wheel),
             cwd=home)  # fmt: skip
    (packages,) = home.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return made


@pytest.mark.slow
def test_wheel__is_brought_to_machines_without_it_by_a_runtime_environment(
    wheel: Path, tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    """A cluster whose machines have the dependencies alone, and a job with `pip` of the wheel: its command and its
    tasks on workers run what was installed."""
    (tmp_path / "machine").mkdir()
    bare = environment(tmp_path / "machine")
    write_crops(tmp_path / "crops", 6)
    shell = without_ray(HOME=str(tmp_path), OMP_NUM_THREADS="1", PATH=f"{Path(bare).parent}:/usr/bin:/bin")
    shell.pop("PYTHONPATH", None)
    lacks = subprocess.run([bare, "-c", "import cluster"], cwd=tmp_path, env=shell, capture_output=True, text=True)
    assert "No module named 'cluster'" in lacks.stderr
    options = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    environment_of_job = {"pip": {"packages": [str(wheel)], "pip_install_options": options}}
    (tmp_path / "job.sh").write_text(f"python -c 'import cluster; print(cluster.__file__)' && reid-cluster shard "
                                     f"{tmp_path}/crops --out {tmp_path}/shards\n")  # fmt: skip
    with ray_head(shell, own_python=bare) as head:
        words = ["ray.scripts.scripts", "job", "submit", "--address", head.dashboard, "--runtime-env-json",
                 json.dumps(environment_of_job), "--", "sh", str(tmp_path / "job.sh")]  # fmt: skip
        done = subprocess.run([bare, "-m", *words], cwd=tmp_path, env=shell, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(r"/runtime_resources/pip/\w+/virtualenv/lib/\S+/cluster/__init__.py", said), said
    assert Manifest.load(str(tmp_path / "shards")).rows == 6


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
