"""What a step asks of a GPU: operations by part, kernels, and the lines at which the host waits."""

import ctypes
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.support.frames import innermost_line
from tests.support.operations import Operations

NULL_GPU = "NULL_GPU"
"""Variable that is set where the GPU is one that is not there (`tests/null_gpu`)."""
LAUNCHED, PRODUCTS = 0, 1
"""Places of kernels and of cuBLAS's products among the counters of `tests/null_gpu/null.c`."""
SYNCHRONIZING = "called a synchronizing CUDA operation"
Waits = Counter[str]
"""file:line -> how often the host waited for the GPU there."""


class OperationsByPart:
    """Operations of torch's dispatcher, without views and allocations: about one kernel each, on any GPU."""

    def __init__(self, counted: Operations) -> None:
        self._counted, self._parts, self._since = counted, ["idle"], 0
        self.of: Counter[str] = Counter()

    def enter(self, part: str) -> None:
        """From here on they are those of `part`."""
        self._settle()
        self._parts.append(part)

    def leave(self) -> None:
        """And now again those of the part before."""
        self._settle()
        self._parts.pop()

    def _settle(self) -> None:
        now = self._counted.launched.total()
        self.of[self._parts[-1]] += now - self._since
        self._since = now


@contextmanager
def waits() -> Iterator[Waits]:
    """Where the host waits for the GPU meanwhile, as PyTorch notices it: at reads of tensors and copies from and to
    pageable memory; explicit synchronisation is not among them."""
    found: Waits = Counter()

    def note(message: Any, category: Any, filename: str, number: int, file: Any = None, line: Any = None) -> None:
        del category, file, line
        if SYNCHRONIZING in str(message):
            found[innermost_line(__file__, f"{filename}:{number}")] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def kernels(once: Callable[[], None]) -> tuple[dict[str, float], str]:
    """What `once` launches, {"kernels": their number, "busy_ms": how long at least one of them runs}, and why one of
    both is not there. On a real GPU from torch.profiler; where there is none from what stands in for it, which runs
    nothing."""
    if os.environ.get(NULL_GPU):
        library = ctypes.CDLL(None)
        library.nullcuda_counts.restype = ctypes.POINTER(ctypes.c_long)
        counts = library.nullcuda_counts()
        before = counts[LAUNCHED] + counts[PRODUCTS]
        once()
        return {"kernels": counts[LAUNCHED] + counts[PRODUCTS] - before}, "kernels take no time on this GPU"
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            once()
            torch.cuda.synchronize()
        ran = [(one.time_range.start, one.time_range.end) for one in profiled.events()
               if one.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
    except RuntimeError as error:
        return {}, f"torch.profiler: {error}"
    if not ran:
        return {}, "torch.profiler saw no kernel: CUPTI may not be used here"
    return {"kernels": len(ran), "busy_ms": covered(ran) / 1_000}, ""


def covered(spans: list[tuple[float, float]]) -> float:
    """How much is in at least one of the spans (start, end)."""
    found, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        found += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return found
