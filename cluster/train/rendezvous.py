"""How the workers of a group meet: at a store of PyTorch's that listens on the address of one machine and no other.

Left to itself it listens on every interface of the first worker's machine. Whoever reaches that port can read and write
what the ranks tell each other when they begin, and nothing asks who they are.
"""

import datetime
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig

from cluster.core.devices import Kind, own_device
from cluster.train.coordinator import WorkerLocation, find_coordinator
from cluster.train.watch import early_signs
from cluster.train.watch.restart_policy import Failure
from cluster.train.worker_host import hear_signals
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ClusterError, ConfigError
from datapipe.core.process_setup import numbers_in_environment
from training.core.devices import bind
from training.core.launchers import forget_launchers
from training.core.run_folder import crash_log

FAREWELL = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
FAREWELL_S = 5
"""Seconds for workers to leave their process group before they are ended; one that waits for a dead one never does."""
WAITING = 1024
"""Connections that may wait to be accepted: all workers come at once."""

REACH_S = 25.0
"""Seconds in which the first worker has to be reached."""
CONNECT_S = 5.0
"""Seconds of one attempt."""

_Theirs: Any = TorchConfig().backend_cls

_listening: socket.socket | None = None
"""In the first worker's process, between `listen` and `meet`."""

_words: list[crash_log.LastWords] = []
"""In a worker's process, between `meet` and `take_leave`."""

_group: list[Any] = []
"""In the controller's process: the group of workers that was started last."""


class Meeting(_Theirs):
    """Ray Train's start of a group of PyTorch workers, but for where their store listens, and how they are bound to
    their GPUs."""

    def on_start(self, worker_group: Any, backend_config: "MeetingConfig") -> None:
        """In the controller. Returns when all workers have met. Raises what any of them raises."""
        coordinator, size = find_coordinator(backend_config.coordinator), len(worker_group)
        _group[:] = [worker_group]
        group = ray.get(coordinator.open.remote())
        begun = [worker_group.execute_single_async(rank, early_signs.begin, coordinator, group, rank)
                 for rank in range(size)]  # fmt: skip
        ray.get(begun)
        places = [WorkerLocation(rank, *found) for rank, found in enumerate(worker_group.execute(locate))]
        ray.get(coordinator.place.remote(places))
        host, port = worker_group.execute_single(0, listen)
        try:
            ray.get([
                worker_group.execute_single_async(rank, meet, rank, size, host, port, backend_config)
                for rank in range(size)
            ])  # fmt: skip
        except RayTaskError as error:
            if isinstance(error.cause, ClusterError):
                ray.get(coordinator.blame.remote(Failure("start", error.cause.what)))
            raise

    def on_shutdown(self, worker_group: Any, backend_config: "MeetingConfig") -> None:
        """In the controller, before workers are ended, dead or alive. Returns when all workers have left, or after a
        while."""
        ray.get(find_coordinator(backend_config.coordinator).close.remote())
        os.environ.setdefault(FAREWELL, str(FAREWELL_S))
        super().on_shutdown(worker_group, backend_config)


@dataclass
class MeetingConfig(TorchConfig):
    """For `TorchTrainer`."""

    kind: Kind = "cpu"
    """What workers compute on."""
    coordinator: str = ""
    """Name of the coordinator."""
    out: str = ""
    """Run folder."""
    storage: StorageConfig = StorageConfig()
    """How it is reached."""

    @property
    def backend_cls(self) -> Any:
        return Meeting


def take_leave() -> None:
    """In a worker whose work is over: what happens to the process from now on is no matter for the run."""
    while _words:
        _words.pop().end()


def ask_workers() -> dict[Any, int]:
    """In the controller: references to where each worker of the last group is, by which those that live are told from
    the dead -> its rank."""
    return {group.execute_single_async(rank, locate): rank for group in _group for rank in range(len(group))}


def locate() -> tuple[str, str, int]:
    """In a worker: (Ray's id of its machine, address, process id)."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()


def listen() -> tuple[str, int]:
    """In the first worker: open the port on this machine's address in the cluster. Returns (address, port)."""
    global _listening
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    _listening = socket.socket(family, socket.SOCK_STREAM)
    _listening.bind((host, 0))
    _listening.listen(WAITING)
    return host, _listening.getsockname()[1]


def meet(rank: int, size: int, host: str, port: int, config: MeetingConfig) -> None:
    """In every worker, in its main thread: join the process group, bound to its own GPU. Raises
    torch.distributed.DistError after the timeout, ClusterError where rank 0 is not reached, ConfigError, also to the
    coordinator, where torch cannot use the GPU that Ray has given, or reads a variable of the environment as a number
    that it is not."""
    global _listening
    hear_signals()
    forget_launchers()
    given: dict[str, Any] = {}
    if rank:
        _reach(host, port)
    else:
        assert _listening is not None
        given["master_listen_fd"], _listening = _listening.detach(), None
    _words.append(crash_log.start(config.out, config.storage, rank))  # NCCL speaks from its first communicator on
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    try:
        with numbers_in_environment():
            _join(rank, size, host, port, config, given)
    except ConfigError as error:
        ray.get(find_coordinator(config.coordinator).fail.remote(error))
        raise


def _reach(host: str, port: int) -> None:
    """Returns if a connection to the first worker is possible, else raises ClusterError: within a minute, and with its
    reason, where PyTorch's own attempt takes as long as the slowest start may."""
    end = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                here = ray.util.get_node_ip_address()
                raise ClusterError(f"{here} does not reach {host}:{port}, where the ranks meet: {error}",
                                   where=f"machine {here}",
                                   hint="open all ports between the machines; `ray start --node-ip-address` says which "
                                        "address is a machine's") from error  # fmt: skip
        time.sleep(0.5)


def _join(rank: int, size: int, host: str, port: int, config: MeetingConfig, given: dict[str, Any]) -> None:
    device = own_device(config.kind)
    bind(device)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    store = dist.TCPStore(host, port, size, rank == 0, timeout, wait_for_workers=False, **given)
    bound = device if device.type == "cuda" else None  # left to itself NCCL goes by rank modulo GPUs
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
