"""The null GPU as it is, kernels doing nothing: who waits for the GPU in a step, or copies to it, and how often, by
line."""

import collections
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.support.frames import innermost_line

COUNTED = (
    "launch", "gemm", "copy_h2d", "copy_h2d_pinned", "copy_d2h", "copy_d2h_pinned", "copy_d2d", "copy_sync", "memset",
    "stream_sync", "event_sync", "device_sync", "malloc", "free", "host_alloc", "collective", "event_record",
    "stream_wait", "bytes_h2d", "bytes_d2h", "bytes_d2d", "now", "peak", "host_now", "host_peak",
)  # fmt: skip
"""What `null.c` counts, in its order."""
WAITS = ("stream_sync", "event_sync", "device_sync", "copy_sync")
"""Those in which the host stands still until the GPU has done what it was told."""
BESIDE = ("copy_h2d", "copy_h2d_pinned", "stream_wait")
"""Copies to the GPU, those of them from pinned memory, and waits of one stream for another."""
WARM_UP = 3
"""Steps before anything is counted."""
HERE = f"{Path(__file__).parent}/"
DEEPEST = 60
"""Frames that are looked through for a line of ours."""


class Waiting:
    """Counts by line of ours, from step WARM_UP on; saving is not counted."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.nullcuda_callback.argtypes = [ctypes.c_void_p, ctypes.c_long]
        self._note = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_long)(self._count)
        self._found: collections.Counter[tuple[str, str]] = collections.Counter()
        self._steps, self._counting = 0, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """`training.trainer.loop` with this looking on; at the end it is told what was found."""
        from training.trainer import loop

        observe, keep = loop._observe, loop._keep
        mask = sum(1 << COUNTED.index(kind) for kind in (*WAITS, *BESIDE))
        self._library.nullcuda_callback(ctypes.cast(self._note, ctypes.c_void_p), mask)
        try:
            with mock.patch.multiple(loop, _observe=self._stepping(observe), _keep=self._aside(keep)):
                yield
        finally:
            self._library.nullcuda_callback(None, 0)
            print(self, file=sys.stderr)

    def __str__(self) -> str:
        steps = max(1, self._steps - WARM_UP)
        lines = []
        for what, kinds in (("waits for the GPU", WAITS), ("copies and streams", BESIDE)):
            lines.append(f"{what} per step, in {steps} steps after step {WARM_UP}:")
            lines += [f"{count / steps:8.1f}  {kind:15}  {line}" for (kind, line), count in self._found.most_common()
                      if kind in kinds]  # fmt: skip
        return "\n".join(lines)

    def _count(self, kind: int, _: int) -> None:
        if self._counting:
            self._found[COUNTED[kind], innermost_line(HERE, deepest=DEEPEST)] += 1

    def _stepping(self, observe: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*words: Any, **named: Any) -> Any:
            found = observe(*words, **named)
            self._steps += 1
            self._counting = self._steps >= WARM_UP
            return found

        return observed

    def _aside(self, keep: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*words: Any, **named: Any) -> Any:
            before, self._counting = self._counting, False
            try:
                return keep(*words, **named)
            finally:
                self._counting = before

        return kept


@contextmanager
def idle() -> Iterator[None]:
    """Nothing is computed: numbers are what lies in memory. No cuDNN; the convolution that cuts patches is one product,
    as cuDNN makes it."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    with mock.patch.object(nn.Conv2d, "forward", _cut(nn.Conv2d.forward)):
        yield


def _cut(real: Callable[[nn.Conv2d, Tensor], Tensor]) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    def forward(self: nn.Conv2d, images: Tensor) -> Tensor:
        height, width = self.kernel_size
        if self.kernel_size != self.stride or self.padding != (0, 0) or not images.is_cuda:
            return real(self, images)
        if torch.is_autocast_enabled("cuda"):
            images = images.to(torch.get_autocast_dtype("cuda"))
        rows = images.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        found = nn.functional.linear(rows.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        return found.transpose(1, 2).unflatten(2, rows.shape[1:3])

    return forward
