"""Pieces of work over the devices of a cluster: a task each, retried alone, on a GPU of its own where there are any."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cluster.core.devices import Kind, decide, hidden, offered
from cluster.core.ray_workers import RayWorkers, check_nodes
from cluster.core.session import LOCAL, ray_session
from cluster.core.shared_paths import marked, witnesses
from datapipe.core.resource_limits import available_cores
from datapipe.core.stop_signals import GOES_ON, unwinding
from datapipe.storage import is_remote
from training.core.devices import Device


@contextmanager
def devices_of(address: str, device: Device, *, written: str, read: Sequence[str]) -> Iterator[tuple[RayWorkers, Kind]]:
    """Who carries out the pieces, and what on. `written`: the folder that all of them write to; `read`: what they read.

    Raises ConfigError where a GPU is asked for, and none is there that torch can use, DataError where a machine does
    not see these places.
    """
    with ExitStack() as stack:
        stack.enter_context(ray_session(address, cpus=available_cores()))
        stack.enter_context(unwinding(GOES_ON))  # the one exception that Ray passes on from a signal handler
        choice = decide(device, offered(embedded=address == LOCAL))
        print(f"device: {choice.kind} ({choice.why})", flush=True)
        if unused := hidden(choice, device):
            print(unused, flush=True)
        seen = witnesses(read)
        if not is_remote(written):
            seen = (*stack.enter_context(marked([written])), *seen)
        if address == LOCAL:
            seen = ()
        else:
            check_nodes(seen)
        yield RayWorkers(seen=seen, gpus=1 if choice.kind == "cuda" else 0), choice.kind


def begin_piece(kind: Kind) -> None:
    """In a worker, before the work: one thread of PyTorch for each CPU that Ray gives a task."""
    from cluster.core.session import prepare

    prepare()
    import torch

    if kind == "cpu":
        torch.set_num_threads(1)
