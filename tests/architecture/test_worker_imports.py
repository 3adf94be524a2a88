"""What a worker imports before its engine is up: each restart waits for it, on every machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.tiny import generated, recipe
from tests.support.golden import ROOT

NOT_NEEDED = {
    "IPython", "absl", "datapipe.ingest", "datapipe.maintain", "datapipe.sources", "datapipe.synth", "h5py", "joblib",
    "lmdb", "matplotlib", "networkx", "rich", "scipy", "sklearn", "tensorboard", "torch._inductor.select_algorithm",
    "training.clustering.dbscan", "training.clustering.jaccard", "training.commands", "training.evaluation",
    "training.grid", "training.reid.ranking", "training.reid.retrieval", "training.reid.zero_shot", "training.report",
    "training.trainer.pseudo_labels",
}  # fmt: skip
"""What is for scores, clusters, reports, data sets and figures, with the packages that these want."""
NOT_NEEDED_WITHOUT_RAY = {"boto3", "botocore", "cluster", "pandas", "ray", "requests"}
WHILE_STANDING_BY = {"absl", "tensorboard"}
"""What is needed for the first record is imported ahead, where there is time."""
LOOKS_AT_GPUS = ("_lazy_init", "device_count", "get_device_capability", "get_device_properties", "is_available")
"""Functions of torch.cuda. A process that has called one of them knows no other GPUs than those of that moment."""
LOOK = """
import json, sys, traceback
import torch

def watched(name, function):
    def call(*given, **named):
        calls.append(name + " by " + "".join(traceback.format_stack(limit=3)[:-1]))
        return function(*given, **named)
    return call

calls = []
for name in sys.argv[2:]:
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))
import training.trainer.pretrain
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import alone
from training.engine import deepspeed
from training.trainer import loop

found = []

def note():
    found.append(sorted(sys.modules))

def stop(*_):
    note()
    raise KeyboardInterrupt

at_gpus = [*calls]
deepspeed.load()
note()
from cluster.train import imports_ahead

calls.clear()
imports_ahead.load()
at_gpus += calls
imports_ahead.load(["deepspeed"])
note()
loop._observe = stop
try:
    with alone("cpu", group=True) as world:
        training.trainer.pretrain.pretrain(recipes.load(sys.argv[1], []), world=world, host=LocalHost())
except KeyboardInterrupt:
    print(json.dumps([at_gpus, *found]))
"""


def _under(modules: set[str], names: set[str]) -> set[str]:
    """Those names that are among the modules, or a package of theirs."""
    packages = {name for module in modules for name in _parents(module)}
    return names & packages


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


@pytest.mark.slow
def test_worker__imports_what_its_engine_needs_and_ahead_all_that_its_first_step_does(tmp_path: Path) -> None:
    path = recipe(tmp_path, generated(tmp_path, 12), str(tmp_path / "run"), epochs=1)
    path.write_text(path.read_text().replace('stepper = "plain"', 'stepper = "deepspeed"'))
    done = subprocess.run([sys.executable, "-c", LOOK, str(path), *LOOKS_AT_GPUS], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    at_gpus, *found = json.loads(done.stdout.splitlines()[-1])
    assert at_gpus == [], "which GPU a worker has is not known while it stands by"
    alone, ahead, stepped = map(set, found)
    assert {"deepspeed", "training.trainer.pretrain"} <= alone and {"cluster.train.worker", "ray"} <= ahead
    assert _under(alone, NOT_NEEDED | NOT_NEEDED_WITHOUT_RAY) == set()
    assert _under(ahead, NOT_NEEDED - WHILE_STANDING_BY) == set()
    assert _outside(stepped - ahead) == set(), "a worker that stood by imports nothing more until its first step"


def _outside(modules: set[str]) -> set[str]:
    """Top-level packages, but for Python's own library, PIL's formats (the picture of the first batch, which restarts
    do not draw again) and the few modules that DeepSpeed chooses by its settings."""
    return {name.partition(".")[0] for name in modules} - {*sys.stdlib_module_names, "PIL", "deepspeed"}
