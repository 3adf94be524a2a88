"""Whole commands on a GPU that is not there: losses and gradient norms are those of the CPU, to the last bit.

Two cases by default, all of them with NULL_GPU_CASES=all (`make test-null-gpu`).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.local_nodes import local_nodes
from tests.end_to_end.tiny import shards, step_records
from tests.null_gpu.build import HERE, environment, missing
from tests.support.golden import ROOT

Write = Callable[..., dict[str, bytes]]

TINY = (
    "--stream.block", "4", "--stream.window", "3", "--stream.threads", "1", "--samples-per-epoch", "72",
    "--optimisation.epochs", "1", "--optimisation.warmup-epochs", "0", "--optimisation.batch", "24",
    "--optimisation.micro-batch", "12", "--optimisation.precision", "fp32", "--backbone.attention", "plain",
    "--backbone.arch", "custom", "--backbone.size", "64", "32", "--backbone.patch", "8", "--backbone.width", "32",
    "--backbone.depth", "2", "--backbone.heads", "2", "--backbone.drop-path", "0.1", "--engine.threads", "1",
)  # fmt: skip
HEADS = ("--method.head.out-dim", "64", "--method.head.hidden", "64", "--method.head.bottleneck", "16",
         "--method.local-size", "32", "16", "--method.freeze-last-layer-epochs", "0")  # fmt: skip
DECODERS = ("--method.decoder-depth", "1", "--method.pixel-width", "32", "--method.feature-width", "32",
            "--method.decoder-heads", "2")  # fmt: skip
PLAIN = ("--engine.stepper", "plain")
CPU = ("--engine.device", "cpu")
Case = tuple[str, tuple[str, ...]]
"""A recipe, and flags beside TINY."""
ZERO: dict[str, Case] = {
    f"zero_{stage}": ("pass_vits", (*HEADS, "--engine.stepper", "deepspeed", "--engine.zero-stage", str(stage)))
    for stage in range(4)
}
CASES: dict[str, Case] = {
    "pass": ("pass_vits", (*HEADS, *PLAIN)),
    "dino": ("dino_vits", (*HEADS, *PLAIN)),
    "personvit": ("personvit_vits", (*HEADS, *PLAIN)),
    "personmae": ("personmae_vits", (*DECODERS, *PLAIN)),
    "supervised": ("supervised", ("--optimisation.micro-batch", "24", *PLAIN)),
    **ZERO,
}
LAST_BITS = 2e-6
"""The fused optimizer of a CPU takes the ends of tensors in copies, that of a GPU as they are: other last bits."""
USUAL = ("personvit", "zero_3")
"""Masks that index on the device, and parameters that come and go."""
CHOSEN = CASES if os.environ.get("NULL_GPU_CASES") == "all" else {name: CASES[name] for name in USUAL}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_crops: Write) -> str:
    """The address of 72 crops of 18 people."""
    folder = tmp_path_factory.mktemp("null_gpu")
    write_crops(folder / "crops", 72)
    return shards(folder / "crops", str(folder / "shards")).url


def started(words: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env={**variables, "OMP_NUM_THREADS": "1"},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def ended_well(process: subprocess.Popen[str]) -> str:
    """What it said."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4_000:]
    return output


def under_ray(log: Path, *, devices: int) -> dict[str, str]:
    """Variables for commands, and for machines of a cluster, whose workers have GPUs that talk to each other. `log`:
    of what NCCL says."""
    path = os.pathsep.join([str(HERE / "site"), str(ROOT)])
    return {**environment(devices=devices), "NULLCUDA_SHM": "1", "NULLCUDA_LOG": str(log), "PYTHONPATH": path}


def numbers(run: Path, attempt: int = 1) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in step_records(run, attempt)]


def device_of(run: Path) -> Any:
    return json.loads((run / "environment.json").read_text())["device"]


@pytest.mark.parametrize("name", CHOSEN)
def test_run__has_the_numbers_of_the_cpu(name: str, data: str, tmp_path: Path) -> None:
    recipe, flags = CASES[name]
    words = ["training", "pretrain", recipe, *TINY, "--stream.manifest", data, *flags, "--out"]
    here = started([*words, str(tmp_path / "cpu"), *CPU], dict(os.environ))
    by_processes = ("--stream.processes", "1")  # whose memory is locked for the GPU
    there = started(["tests.null_gpu.inside", *words, str(tmp_path / "gpu"), *by_processes], environment())
    ended_well(here)
    ended_well(there)
    assert device_of(tmp_path / "gpu") == "Null H100" != device_of(tmp_path / "cpu")
    found = numbers(tmp_path / "gpu")
    assert len(found) == 3
    assert np.array(found) == pytest.approx(np.array(numbers(tmp_path / "cpu")), rel=LAST_BITS)


def per_step(output: str) -> dict[tuple[str, str], float]:
    """(kind, file) -> how often in a step, of what an idle run tells by line."""
    found: dict[tuple[str, str], float] = {}
    for count, kind, file in re.findall(r"^ +([\d.]+)  (\w+) +(training/\S+):\d+$", output, re.MULTILINE):
        found[kind, file] = found.get((kind, file), 0.0) + float(count)
    return found


def test_step__waits_for_the_gpu_once_and_for_copies_once_however_many_micro_batches(data: str, tmp_path: Path) -> None:
    recipe, flags = CASES["zero_1"]
    words = ["tests.null_gpu.inside", "--idle", "training", "pretrain", recipe, *TINY, "--stream.manifest", data,
             *flags, "--samples-per-epoch", "240", "--optimisation.micro-batch", "6", "--out"]  # fmt: skip
    found = per_step(ended_well(started([*words, str(tmp_path / "run")], environment())))
    copies, step = "training/core/device_copy.py", "training/engine/stepper.py"
    waits = {where: count for where, count in found.items() if where[0].endswith("sync")}
    assert waits == pytest.approx({("stream_sync", step): 1.0, ("stream_sync", copies): 1.0}, abs=0.2)
    pinned = {file: count for (kind, file), count in found.items() if kind == "copy_h2d_pinned"}
    assert pinned == {file: count for (kind, file), count in found.items() if kind == "copy_h2d"}
    views, small, dropped, micro_batches = 11, 1, 1, 4
    assert pinned[copies] == pytest.approx((views + small + dropped) * micro_batches, abs=2.5), "one of all small ones"
    assert found["stream_wait", copies] == pytest.approx(2 * micro_batches, abs=0.5)


@pytest.mark.skipif(CHOSEN is not CASES, reason="a trial of compiled blocks: with NULL_GPU_CASES=all")
def test_run__that_would_compile_goes_on_without_where_the_gpu_cannot(data: str, tmp_path: Path) -> None:
    """A kernel of Triton computes nothing on a GPU that is not there."""
    recipe, flags = CASES["dino"]
    words = ["training", "pretrain", recipe, *TINY, "--stream.manifest", data, *flags, "--out"]
    ended_well(started([*words, str(tmp_path / "cpu"), *CPU], dict(os.environ)))
    script = (
        "from training.preflight import compiler; compiler.LEAST_STEPS = 1; import tests.null_gpu.inside as i; i.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *words, str(tmp_path / "gpu")], cwd=ROOT, text=True,
                               env={**environment(), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    assert "blocks are not compiled: " in ended_well(process)
    assert np.array(numbers(tmp_path / "gpu")) == pytest.approx(np.array(numbers(tmp_path / "cpu")), rel=LAST_BITS)


@pytest.mark.skipif(CHOSEN is not CASES, reason="two GPUs under Ray: with NULL_GPU_CASES=all")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_run__under_ray_on_two_gpus_has_the_numbers_of_two_cpus(stage: int, data: str, tmp_path: Path) -> None:
    recipe, flags = CASES[f"zero_{stage}"]
    words = ["cluster", "pretrain", recipe, *TINY, "--stream.manifest", data, *flags, "--cluster.max-workers", "2",
             "--cluster.standby", "True",
             "--optimisation.micro-batch", "6", "--out"]  # fmt: skip
    ended_well(started([*words, str(tmp_path / "cpu"), *CPU], dict(os.environ)))
    log = tmp_path / "nccl.log"
    ended_well(started([*words, str(tmp_path / "gpu")], under_ray(log, devices=2)))
    assert device_of(tmp_path / "gpu") == "Null H100"
    assert "rank 0 of 2" in log.read_text() and "rank 1 of 2" in log.read_text()
    found = numbers(tmp_path / "gpu")
    assert len(found) == 3
    assert np.array(found) == pytest.approx(np.array(numbers(tmp_path / "cpu")), rel=LAST_BITS)


@pytest.mark.skipif(CHOSEN is not CASES, reason="unequal machines under Ray: with NULL_GPU_CASES=all")
def test_run__on_machines_with_one_gpu_and_with_two_binds_each_worker_to_its_own(data: str, tmp_path: Path) -> None:
    """NCCL refuses two ranks on one GPU, which is what rank modulo GPUs comes to here."""
    recipe, flags = CASES["zero_2"]
    log = tmp_path / "nccl.log"
    variables = under_ray(log, devices=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with local_nodes(0) as cluster:
            for count, visible in ((1, "0"), (2, "1,2")):
                cluster.add_node(num_cpus=count, num_gpus=count, env_vars={"CUDA_VISIBLE_DEVICES": visible})
            words = ["cluster", "pretrain", recipe, *TINY, "--stream.manifest", data, *flags, "--address",
                     cluster.address, "--cluster.max-workers", "3", "--cluster.min-workers", "3",
                     "--optimisation.micro-batch", "8", "--out", str(tmp_path / "gpu")]  # fmt: skip
            ended_well(started(words, variables))
    bound = set(re.findall(r"rank \d of 3, device index (\d) of CUDA_VISIBLE_DEVICES=(\S+)", log.read_text()))
    assert bound == {("0", "0"), ("0", "1,2"), ("1", "1,2")}
    assert len(numbers(tmp_path / "gpu")) == 3
