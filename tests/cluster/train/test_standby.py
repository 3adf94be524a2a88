"""Workers that stand by: what their processes are given and begin with, and how many are wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.core.ray_internals import SETUP_HOOK
from cluster.forking.server import LOAD
from cluster.train import imports_ahead, standby
from datapipe.core.errors import DataError
from tests.support.golden import ROOT
from training.config import recipe_toml as recipes

GB = standby.BYTES
CALLED = """
import sys
from cluster.core.ray_internals import entitle
entitle(sys.argv[1])
print(1, flush=True)
input()
"""


@pytest.mark.parametrize(
    ("count", "standing", "free", "wanted"),
    [(8, 0, 100 * GB, 8), (8, 8, 100 * GB, 0), (4, 8, 100 * GB, 0), (8, 3, 100 * GB, 5), (8, 0, 3 * GB - 1, 2),
     (8, 0, 0, 0)],
)  # fmt: skip
def test_missing__as_many_as_workers_where_memory_is_free(count: int, standing: int, free: int, wanted: int) -> None:
    assert standby.missing(count, standing, free) == wanted


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 4, 8, 4, 8), (1, 7, 2, 2, 7)])
def test_missing__never_more_stand_by_than_the_largest_group_had(sizes: tuple[int, ...]) -> None:
    """Each group is given those that stand by, and then has its own started."""
    standing = 0
    for size in sizes:
        standing = max(0, standing - size)
        standing += standby.missing(size, standing, 100 * GB)
        assert size <= standing <= max(sizes)


def test_environment__keeps_what_workers_are_given() -> None:
    config = recipes.load("pass_vits", ["--out", "s3://b/run", "--engine.stepper", "deepspeed"])
    given = {"NCCL_DEBUG": "INFO", SETUP_HOOK: "some.package.install"}
    found = imports_ahead.environment(given, config, kind="cpu", cpus=2.5)
    assert found == {
        "NCCL_DEBUG": "INFO",
        SETUP_HOOK: "cluster.train.imports_ahead.prepare",
        LOAD: "cluster.train.imports_ahead.load_for_ray",
        imports_ahead.CORES: "2",
        imports_ahead.NEEDS: "deepspeed s3",
        imports_ahead.GIVEN: "some.package.install",
    }
    on_gpus = imports_ahead.environment({}, config, kind="cuda", cpus=0.5)
    assert on_gpus[imports_ahead.NEEDS] == "s3", "DeepSpeed looks for GPUs, and which the worker has is unknown"
    assert on_gpus[imports_ahead.CORES] == "1" and imports_ahead.GIVEN not in on_gpus


def own_hook() -> None:
    """A run's own set-up hook."""
    raise DataError("called")


def test_prepare__runs_the_runs_own_hook_whatever_became_of_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fail(needs: list[str]) -> None:
        asked.append(needs)
        raise ImportError("no such library")

    def unconnected() -> str:  # Ray's own would start a cluster in this process
        raise RuntimeError("no worker of Ray's")

    monkeypatch.setattr(imports_ahead, "load", fail)
    monkeypatch.setattr(imports_ahead, "title", unconnected)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in ((imports_ahead.CORES, "3"), (imports_ahead.NEEDS, "deepspeed s3"),
                        (imports_ahead.GIVEN, f"{__name__}.{own_hook.__name__}")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="called"):
        imports_ahead.prepare()
    assert asked == [["deepspeed", "s3"]] and os.environ["OMP_NUM_THREADS"] == "3"


def test_standing_by__counts_processes_by_their_name(tmp_path: Path) -> None:
    title = f"{standby.TITLE} {tmp_path}"
    assert standby.standing_by(title) == 0
    words = [sys.executable, "-c", CALLED, title]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert standby.standing_by(title) == 1 and standby.standing_by(title[:-1]) == 0
        process.communicate("\n")
    assert standby.standing_by(title) == 0
