"""What other launchers leave in the environment: a shell inside `srun`, `mpirun` or `torchrun`, a pod of an operator, a
notebook of a training service. Nothing here was started by them in their way, but torch and DeepSpeed would believe it.
"""

import contextlib
import os
from collections.abc import Iterator

FAMILIES = ("OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_", "I_MPI_", "HYDRA_", "CROSS_", "TORCHELASTIC_")
"""Beginnings of names: Open MPI, PMI and PMIx, MVAPICH, Intel MPI, Hydra, DeepSpeed's and PyTorch's own launchers."""
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
         "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MPIRUN_COMMAND",
         "AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV", "DLTS_JOB_ID")  # fmt: skip
"""Whole names, those of Azure ML and SageMaker among them, by which DeepSpeed looks for their MPI."""
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""How many processes a launcher has started."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Through which network interface processes talk; set for whole clusters, whatever a machine has."""


def forget_launchers() -> dict[str, str]:
    """Take their variables out of this process's environment. Returns what was taken."""
    names = [name for name in os.environ if name in NAMES or name.startswith(FAMILIES)]
    return {name: os.environ.pop(name) for name in names}


@contextlib.contextmanager
def without_launchers() -> Iterator[int]:
    """An environment without their variables, which come back afterwards. Yields how many processes they say there are;
    1 where none says so."""
    sizes = [os.environ.get(name, "") for name in SIZES]
    taken = forget_launchers()
    try:
        yield max((int(size) for size in sizes if size.isdecimal()), default=1)
    finally:
        forget_launchers()  # what was set in the meantime
        os.environ |= taken


def stay_on_loopback() -> None:
    """Have the process groups of this machine alone use its loopback interface: an interface that the environment names
    for a cluster may be absent here."""
    import psutil  # a world of one process without a group needs it not

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            os.environ |= {variable: name for variable in INTERFACES if variable in os.environ}
            return
