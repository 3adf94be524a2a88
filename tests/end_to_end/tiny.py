"""A run so small that a test can afford several: a recipe, a data set, and runs in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.storage import open_store
from tests.datapipe.crop_set import jpegs
from tests.support.golden import ROOT
from tests.support.warm_python import Process, python
from training.checkpoint import Reader, complete
from training.config.run_config import RunConfig
from training.core.host import LocalHost

RECIPE = """
out = "{out}"
seed = 3
[stream]
manifest = "{manifest}"
block = 4
window = 3
threads = 1
[views]
interpolation = "linear"
[backbone]
arch = "custom"
size = [32, 16]
patch = 8
width = 24
depth = 2
heads = 2
drop_path = 0.2
[method]
name = "pass"
locals_per_part = 1
local_size = [16, 8]
[method.head]
out_dim = 32
hidden = 24
bottleneck = 8
[optimisation]
epochs = {epochs}
batch = 6
micro_batch = 6
lr = 2e-3
warmup_epochs = 0.5
clip_norm = 0.3
ema = 0.9
precision = "fp32"
[engine]
stepper = "plain"
threads = 1
audit = true
[checkpoints]
every_steps = 3
keep_last = 3
[cluster]
max_workers = 1
standby = false
"""


def recipe(folder: Path, manifest: str, out: str, *, epochs: float = 1.0) -> Path:
    """Write the tiny recipe below `folder`."""
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(out=out, manifest=manifest, epochs=epochs))
    return path


def shards(crops: Path, out: str, storage: StorageConfig | None = None, *, each: int = 17) -> Manifest:
    """Shards of a folder of crops, `each` crops in one."""
    config = ShardConfig(samples_per_shard=each, workers=1)
    return ingest([str(crops)], out, config, storage or StorageConfig()).manifest


def generated(folder: Path, count: int = 18) -> str:
    """A sharded data set of generated crops; its address."""
    (folder / "in").mkdir()
    for row, data in enumerate(jpegs(count)):
        (folder / "in" / f"{row:04d}_c1s1_{row:06d}_00.jpg").write_bytes(data)
    return shards(folder / "in", str(folder / "set")).url


def shrunk(config: RunConfig, manifest: str, out: Path) -> RunConfig:
    """A published recipe with another data set, place, backbone and length; three steps of six images."""
    backbone = replace(config.backbone, arch="custom", size=(64, 32), width=24, depth=2, heads=3, patch=8)
    optimisation = replace(config.optimisation, batch=6, micro_batch=3, epochs=3.0, warmup_epochs=1.0)
    engine = replace(config.engine, stepper="plain", threads=1, device="cpu")
    stream = replace(config.stream, manifest=manifest, threads=1, block=4, window=3)
    return replace(config, out=str(out), backbone=backbone, optimisation=optimisation, engine=engine, stream=stream,
                   samples_per_epoch=6)  # fmt: skip


def command(*words: str, cold: bool = False, **environment: str) -> Process:
    """Start one of our commands; output as text. `cold`: by the real interpreter, for what depends on its imports."""
    return Process(
        [sys.executable if cold else python(), "-m", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finished(process: subprocess.Popen[str], *, timeout_s: float = 300) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command."""
    output, errors = process.communicate(timeout=timeout_s)
    return process.returncode, output, errors


class StoppingHost(LocalHost):
    """Tells a run of one process to end in this step, as SIGTERM would; 0: never."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.asked = step, 0

    def preempted(self) -> bool:
        self.asked += 1  # once a step
        if self.asked == self.step:
            self.received = signal.SIGTERM
        return super().preempted()


def final_state(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    store = open_store(str(run / "checkpoints"))
    reader = Reader(store, complete(store)[-1])
    return {key: reader.whole(key) for key in reader.marker.tensors}


def step_records(run: Path, attempt: int = 1) -> list[dict[str, Any]]:
    """What an attempt recorded of each step, in order: no line about the attempt or its checkpoints."""
    lines = (run / "metrics" / f"attempt_{attempt:03d}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record and "attempt" not in record]


def audited(run: Path) -> dict[int, list[int]]:
    """Step -> samples, over all ranks; where a step was redone, by the world that did it last."""
    return {step: [sample for _, sample in pairs] for step, pairs in seen_in_forward(run).items()}


def seen_in_forward(run: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> (position, sample) of all that reached the forward pass of any rank, of the world that did it last."""
    logs = sorted((run / "ranks").glob("audit_*.jsonl"))
    last = [{line["step"]: line for line in map(json.loads, log.read_text().splitlines())} for log in logs]
    return {step: [pair for own in last[: line["world"]]
                   for pair in zip(own[step]["positions"], own[step]["samples"], strict=True)]
            for step, line in last[0].items()}  # fmt: skip
