"""Which process this is among how many, and the few things they do together."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.engine.launchers import stay_on_loopback, without_launchers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """A value: rank among `size` processes, and among those of its machine.

    With `size` 1 nothing is communicated and no process group is needed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """True on the one rank that writes what exists once."""
        return self.rank == 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. The order of additions is fixed for a given size (gloo and NCCL rings)."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def tell(self, value: Any) -> Any:
        """Rank 0's picklable value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def nodes(self) -> tuple[int, ...]:
        """The number of each rank's machine, from 0; all ranks ask together. Ranks of a machine are neighbours."""
        firsts = self.gather(self.rank - self.local_rank)
        return tuple(sorted(set(firsts)).index(first) for first in firsts)

    def expect_within(self, seconds: float) -> None:
        """From now on a rank that waits longer for the others gives up with an error."""
        if self.size > 1:
            dist.set_timeout(timedelta(seconds=seconds))

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int) -> torch.device:
    """`"auto"`: the local rank's GPU where there is one, else the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def alone(device: str = "auto", *, group: bool = False, timeout_s: float = 1_800) -> Iterator[World]:
    """A world of one, whatever another launcher left in the environment. `group` also opens a process group, which
    DeepSpeed insists on."""
    with without_launchers() as processes:
        if processes > 1:
            log.warning("the environment speaks of %d processes (srun, mpirun, torchrun); each that runs this command "
                        "trains by itself. `python -m cluster pretrain` trains with several", processes)  # fmt: skip
        world = World(device=choose_device(device, 0))
        if not group or dist.is_initialized():
            yield world
            return
        stay_on_loopback()
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{free_port()}",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=timeout_s),
        )
        try:
            yield world
        finally:
            dist.destroy_process_group()
