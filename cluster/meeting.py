"""How the workers of a group meet: at a store of PyTorch's that listens on the address of one machine and no other.

Left to itself it listens on every interface of the first worker's machine. Whoever reaches that port can read and write
what the ranks tell each other when they begin, and nothing asks who they are.
"""

import datetime
import ipaddress
import os
import socket
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig

from training.engine.launchers import forget_launchers

WAITING = 1024
"""Connections that may wait to be accepted: all workers come at once."""

_Theirs: Any = TorchConfig().backend_cls

_listening: socket.socket | None = None
"""In the first worker's process, between `listen` and `meet`."""


class Meeting(_Theirs):
    """Ray Train's start of a group of PyTorch workers, but for where their store listens."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Returns when all workers have met. Raises what any of them raises."""
        host, port = worker_group.execute_single(0, listen)
        size = len(worker_group)
        ray.get([
            worker_group.execute_single_async(rank, meet, backend_config.backend, rank, size, host, port,
                                              backend_config.timeout_s)
            for rank in range(size)
        ])  # fmt: skip


class MeetingConfig(TorchConfig):
    """For `TorchTrainer`."""

    @property
    def backend_cls(self) -> Any:
        return Meeting


def listen() -> tuple[str, int]:
    """In the first worker: open the port on this machine's address in the cluster. Returns (address, port)."""
    global _listening
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    _listening = socket.socket(family, socket.SOCK_STREAM)
    _listening.bind((host, 0))
    _listening.listen(WAITING)
    return host, _listening.getsockname()[1]


def meet(backend: str, rank: int, size: int, host: str, port: int, timeout_s: float) -> None:
    """In every worker: join the process group. Raises torch.distributed.DistError after `timeout_s`."""
    global _listening
    forget_launchers()
    timeout = datetime.timedelta(seconds=timeout_s)
    given: dict[str, Any] = {}
    if rank == 0:
        assert _listening is not None
        given["master_listen_fd"], _listening = _listening.detach(), None
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a failing collective ends the worker
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    store = dist.TCPStore(host, port, size, rank == 0, timeout, wait_for_workers=False, **given)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
