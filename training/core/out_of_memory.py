"""Allocations that fail, whoever says so, and the error that scoring ends with. Training's is that of
`training/preflight/memory_advice.py`."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

import torch

from datapipe.core.errors import ConfigError, UserError
from datapipe.core.resource_limits import memory_limit
from training.core.world import World

GB = 10**9
SAYINGS = re.compile(
    r"out of memory|cudaErrorMemoryAllocation|_ALLOC_FAILED|can't allocate memory|not enough memory|"
    r"cannot allocate memory|failed to allocate memory|failed to cuda (m|c)alloc", re.IGNORECASE,
)  # fmt: skip
"""How allocators say so in errors without a type of their own: CUDA's runtime, cuBLAS, cuDNN and cuSOLVER, NCCL, and
PyTorch's for the CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on a GPU or on the host? Also where another error was raised from that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, RuntimeError) and SAYINGS.search(str(cause)):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        cause = cause.__cause__
    return False


@contextlib.contextmanager
def explained(explain: Callable[[Exception], ConfigError]) -> Iterator[None]:
    """Where memory runs out, raises what `explain` makes of the error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explain(error) from error


def scoring_memory(batch: int, device: torch.device | str) -> contextlib.AbstractContextManager[None]:
    """Around embedding and scoring: raises ConfigError where memory runs out, with the images embedded at once."""

    def explain(error: Exception) -> ConfigError:
        smaller = f"--embed-batch {batch // 2}" if batch > 1 else "a device with more memory"
        return ConfigError(
            f"out of memory while scoring on {device_name(World(device=torch.device(device)))}, with {batch} images "
            f"embedded at once ({first_line(error)})", where=f"embed_batch = {batch}",
            hint=f"{smaller} (in a recipe evaluation.scoring.embed_batch); features stay the same up to rounding",
        )  # fmt: skip

    return explained(explain)


def device_name(world: World) -> str:
    """A rank's device and its memory, in a person's terms."""
    room = device_bytes(world)
    size = f" of {room / GB:.2f} GB" if room else ""
    if world.device.type != "cuda":
        return f"the host{size}" if world.local_size == 1 else f"the host, {world.local_size} ranks{size} each"
    return f"{world.device} ({torch.cuda.get_device_name(world.device)}){size}"


def device_bytes(world: World) -> int:
    """Memory of the rank's GPU, or its share of the host's memory; 0 where the system does not say."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    try:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
    return min(room, memory_limit() or room) // world.local_size


def first_line(error: BaseException) -> str:
    """What the allocator said, without its advice and traces."""
    cause = error
    while cause.__cause__ is not None and not str(cause):
        cause = cause.__cause__
    line = (str(cause).splitlines() or [""])[0].partition(". GPU ")[0]
    return line.strip() or type(cause).__name__
