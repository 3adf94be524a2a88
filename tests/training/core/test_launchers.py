"""A run of one process inside shells and pods of other launchers."""

import os

import psutil
import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks
from training.core.launchers import forget_launchers, without_launchers
from training.core.world import World, alone

LEFT = {
    "torchrun": {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "nowhere",
                 "MASTER_PORT": "no", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
               "PMIX_RANK": "2", "LOCAL_SIZE": "word"},
    "mpiexec": {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MV2_COMM_WORLD_SIZE": "4"},
    "a service": {"AZUREML_EXPERIMENT_ID": "1", "SM_TRAINING_ENV": "{}", "OMPI_COMM_WORLD_SIZE": "4"},
}  # fmt: skip


@pytest.mark.parametrize("launcher", LEFT)
def test_launchers__are_forgotten_and_come_back(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    for name, value in {**LEFT[launcher], "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with without_launchers() as processes:
        assert processes == 4
        assert not LEFT[launcher].keys() & os.environ.keys() and os.environ["SLURM_JOB_ID"] == "7"
        os.environ["LOCAL_RANK"] = "0"
    assert dict(os.environ) == before
    assert forget_launchers() == LEFT[launcher]


@pytest.mark.parametrize("launcher", LEFT)
def test_alone__is_one_process_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, launcher: str
) -> None:
    for name, value in {**LEFT[launcher], "GLOO_SOCKET_IFNAME": "ib0"}.items():
        monkeypatch.setenv(name, value)
    with alone("cpu", group=True) as world:
        assert (world.size, dist.get_world_size()) == (1, 1)
        assert os.environ["GLOO_SOCKET_IFNAME"] in psutil.net_if_addrs()
    assert "the environment speaks of 4 processes" in caplog.text


def _started(world: World) -> int:
    """An engine in a rank that was left what mpirun leaves; without compilers or a place for what they make."""
    from training.engine.deepspeed import warm_up

    os.environ |= {**LEFT["mpirun"], **LEFT["a service"], "PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": "/proc/nowhere"}
    forget_launchers()
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "3"
    warm_up(world)
    return int(os.environ["LOCAL_RANK"])


@pytest.mark.slow
def test_deepspeed__starts_after_mpirun_and_without_a_compiler() -> None:
    assert run_ranks(1, _started, fresh=True) == [0]
