"""A GPU that stands still, on two machines under Ray: who is ended, and who is blamed."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.train.watch.restart_policy import HISTORY
from tests.cluster.local_nodes import local_nodes
from tests.end_to_end.tiny import shards
from tests.null_gpu.build import environment, missing
from tests.null_gpu.test_null_gpu import HEADS, PLAIN, TINY, ended_well, numbers, started, under_ray
from tests.support.golden import ROOT

Write = Callable[..., dict[str, bytes]]

STUCK = "1"
"""The GPU that stands still, by its number on this machine."""
FLAGS = (*TINY, *HEADS, *PLAIN, "--cluster.max-workers", "2", "--cluster.min-workers", "2",
         "--optimisation.micro-batch", "6", "--checkpoints.every-steps", "1",
         "--cluster.hang-timeout-s", "20")  # fmt: skip
"""Steps of two micro-batches on each rank."""
REHEARSAL, STEP = 2, 4
"""Timed events: one as a micro-batch's forward pass begins, one as it ends."""

WHERE = """
import torch
from training.trainer.monitoring.stragglers import _Timer
from training.core.step_phase import Whereabouts
timer, found = _Timer(torch.device("cuda", 0)), Whereabouts()
for step in range(2):
    found.at(step, "data")
    found.launched(step, "forward", timer.start().query)
    found.launched(step, "backward", timer.stop().query)
print(*found.now()[:3])
"""
"""Two steps as a rank launches them, and where it is."""

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")


@pytest.mark.slow
@pytest.mark.parametrize(("events", "where"), [("0 3", "1 forward 1"), ("1 3", "1 backward 2")])
def test_place__of_a_gpu_that_is_stuck_is_the_last_event_that_it_reached(
    events: str, where: str, tmp_path: Path
) -> None:
    """PyTorch's own events: the program itself has launched all of both steps."""
    (tmp_path / "stuck").write_text(events)
    done = subprocess.run([sys.executable, "-c", WHERE], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**environment(), "NULLCUDA_STUCK": str(tmp_path / "stuck")})  # fmt: skip
    assert done.stdout.split("\n")[0] == where, done.stderr


class Machines(NamedTuple):
    """Two machines with a GPU each."""

    address: str
    nodes: dict[str, str]
    """Number of its GPU -> Ray's id of the machine."""
    stuck: Path
    """Says where a GPU is to stand still."""
    log: Path
    variables: dict[str, str]
    data: str


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, write_crops: Write) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("hangs")
    write_crops(folder / "crops", 72)
    data = shards(folder / "crops", str(folder / "shards")).url
    stuck, log = folder / "stuck", folder / "nccl.log"
    variables = {**under_ray(log, devices=2), "NULLCUDA_STUCK": str(stuck)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with local_nodes(0) as cluster:
            nodes = {gpu: cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"CUDA_VISIBLE_DEVICES": gpu}).node_id
                     for gpu in ("0", STUCK)}  # fmt: skip
            yield Machines(cluster.address, nodes, stuck, log, variables, data)


def hangs(machines: Machines, events: int, run: Path) -> tuple[dict[str, Any], str]:
    """A run whose GPU STUCK stands still after so many timed events: (its only restart, all that was said)."""
    machines.stuck.write_text(f"{STUCK} {events}")
    machines.log.write_text("")
    said = ended_well(started(["cluster", "pretrain", "pass_vits", *FLAGS, "--stream.manifest", machines.data,
                               "--address", machines.address, "--out", str(run)], machines.variables))  # fmt: skip
    assert not machines.stuck.exists()
    (restart,) = [line for line in map(json.loads, (run / HISTORY).read_text().splitlines()) if line["kind"] != "end"]
    assert restart["kind"] == "hang" and not restart["gave_up"]
    assert numbers(run, attempt=2)[-1][0] == 3
    return restart, said


@pytest.mark.soak
def test_hang__in_the_forward_pass_is_put_down_to_the_rank_whose_event_stays_behind(
    machines: Machines, tmp_path: Path
) -> None:
    """Its program has launched the backward pass, and the other rank waits in it: an event tells them apart."""
    restart, said = hangs(machines, REHEARSAL + STEP + 1, tmp_path / "run")
    (rank,) = set(re.findall(r"rank (\d) of 2, device index 0 of CUDA_VISIBLE_DEVICES=1$", machines.log.read_text(),
                             re.MULTILINE)[:1])  # fmt: skip
    assert restart["rank"] == int(rank) and restart["node"] == machines.nodes[STUCK]
    assert "stood still in step 2 (forward)" in restart["reason"] and "so did" not in restart["reason"]
    assert re.findall(r"^hung: .*; SIGKILL to (process|processes) \d+", said, re.MULTILINE) == ["process"]


@pytest.mark.soak
def test_hang__where_all_stand_alike_is_put_down_to_nobody(machines: Machines, tmp_path: Path) -> None:
    """In the backward pass of the last micro-batch, where the other rank waits for its gradients."""
    restart, said = hangs(machines, REHEARSAL + STEP + STEP, tmp_path / "run")
    assert restart["rank"] is None and not restart["node"]
    assert "all ranks stand at step 2 (backward)" in restart["reason"] and "nobody is behind" in restart["reason"]
    assert re.findall(r"^hung: .*; SIGKILL to (process|processes) \d+", said, re.MULTILINE) == ["processes"]
