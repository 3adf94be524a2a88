"""What an installation has: the data side alone without the extras, and one error that names the extra."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.datapipe.crop_set import jpegs
from tests.support.golden import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "torchvision", "timm", "ray", "deepspeed", "scipy", "scikit-learn", "matplotlib", "tensorboard",
         "safetensors"}  # fmt: skip
SERVED = {"reid-data": "datapipe", "reid-train": "training", "reid-cluster": "cluster"}


def names(requirements: list[str]) -> list[str]:
    """The distributions that requirements name."""
    return [re.match(r"[\w.-]+", line)[0].lower() for line in requirements]  # type: ignore[index]


def alone(packages: list[str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of ours where these distributions, and what they need, are all that is installed."""
    line = [sys.executable, "-m", "tests.support.only_packages", ",".join(packages), *words]
    return subprocess.run(line, cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, text=True,
                          capture_output=True)  # fmt: skip


def test_metadata__the_data_side_needs_nothing_heavy() -> None:
    extras = PROJECT["optional-dependencies"]
    base = set(names(PROJECT["dependencies"]))
    assert base & HEAVY == set()
    assert not HEAVY - base - {*names(extras["train"])} - {*names(extras["cluster"])}
    assert "reid-pretraining[train]" in extras["cluster"] and "reid-pretraining[train,cluster]" in extras["dev"]
    assert {name: place.partition(".")[0] for name, place in PROJECT["scripts"].items()} == SERVED
    assert all((ROOT / package / "py.typed").is_file() for package in SERVED.values())


@pytest.mark.slow
def test_data_side__shards_and_verifies_without_the_extras(tmp_path: Path) -> None:
    base = names(PROJECT["dependencies"])
    (tmp_path / "crops").mkdir()
    for row, data in enumerate(jpegs(5)):
        (tmp_path / "crops" / f"{row}.jpg").write_bytes(data)
    for words in (("shard", "crops", "--out", "shards", "--workers", "1"), ("verify", "shards", "--decode", "all"),
                  ("stats", "shards")):  # fmt: skip
        done = alone(base, "datapipe", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for package, words, extra in (("training", ("report", "run"), "train"), ("cluster", ("status", "run"), "cluster")):
        done = alone(base, package, *words, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "which is not installed" in done.stderr and f"pip install 'reid-pretraining[{extra}]'" in done.stderr
        assert alone(base, package, "--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("package", SERVED.values())
def test_version__is_that_of_the_distribution(package: str, tmp_path: Path) -> None:
    said = alone(names(PROJECT["dependencies"]), package, "--version", cwd=tmp_path).stdout
    assert said == f"reid-pretraining {PROJECT['version']}\n"
