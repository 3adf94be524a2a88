"""Which process this is among how many, and the few things they do together."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.core.devices import Device, bind, choose_device
from training.core.launchers import stay_on_loopback, without_launchers

log = logging.getLogger(__name__)

FIRST_LOOK_S, LOOK_S = 0.002, 0.5
"""Seconds between looks whether all ranks have come: the first pause, and the longest."""


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
    def is_leader(self) -> bool:
        """True on the one rank that writes what exists once."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def nodes(self) -> tuple[int, ...]:
        """The number of each rank's machine, from 0; all ranks ask together. Ranks of a machine are neighbours."""
        firsts = self.all_gather(self.rank - self.local_rank)
        return tuple(sorted(set(firsts)).index(first) for first in firsts)

    @property
    def rendezvous(self) -> dist.Store:
        """The key-value store in which the ranks met when they began; there is one where they are several."""
        return dist.distributed_c10d._get_default_store()

    def expect_within(self, seconds: float) -> None:
        """From now on a rank that waits longer for the others gives up with an error, in every process group that there
        is: DeepSpeed makes some of its own, with torch's default of 10 minutes (NCCL) or 30 (gloo)."""
        for group in process_groups():
            dist.set_timeout(timedelta(seconds=seconds), group)

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def meet(self) -> None:
        """Return once every rank has come here, however late: for work that one rank does while the others wait.

        They ask the store in which the ranks met when they began. A collective would end the run after its timeout, and
        NCCL's watchdog the process with it. A rank that never comes is for the host to find.
        """
        if self.size == 1:
            return
        store = self.rendezvous
        turn = store.add(f"meet/{self.rank}", 1)
        if store.add(f"meet/come/{turn}", 1) == self.size:
            store.set(f"meet/all/{turn}", "1")
        pause_s = FIRST_LOOK_S
        while not store.check([f"meet/all/{turn}"]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S)


def process_groups() -> list[dist.ProcessGroup]:
    """The groups that this process is in, whoever made them."""
    return list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []


@contextlib.contextmanager
def alone(device: Device = "auto", *, index: int = 0, group: bool = False, timeout_s: float = 1_800) -> Iterator[World]:
    """A world of one, whatever another launcher left in the environment. `index`: of its GPU among those that this
    process sees. `group` also opens a process group, which DeepSpeed insists on. Raises as `choose_device`."""
    with without_launchers() as processes:
        if processes > 1:
            log.warning("the environment speaks of %d processes (srun, mpirun, torchrun); each that runs this command "
                        "trains by itself. `python -m cluster pretrain` trains with several", processes)  # fmt: skip
        world = World(device=choose_device(device, index))
        bind(world.device)
        if not group or dist.is_initialized():
            yield world
            return
        stay_on_loopback()
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1, timeout=timedelta(seconds=timeout_s))  # fmt: skip
        try:
            yield world
        finally:
            dist.destroy_process_group()
