"""Whether a step done again gives the same bits, and what a run may promise of that.

Operations of our recipes that CUDA carries out by additions in any order unless told otherwise, as PyTorch says of its
kernels:

    attention     backward of the fused kernels (flash, memory-efficient; cuDNN's has no other way and is left out)
    convolution   cuDNN's backward of the patch embedding and the convolutional stem; its choice of kernels by timing
    resizing      bicubic, backward: position tables, with views of another size than the native one
    gather        backward: PersonMAE's visible patches and targets
    cuBLAS        products that share a workspace among streams

Under `engine.deterministic` each has an order of its own. What remains is said in `guarantee`.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from training.config.run_config import RunConfig
from training.core.world import World

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = ":4096:8"
"""Workspaces of a fixed size, with which cuBLAS sums in a fixed order; read before its first product."""


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that give the same bits each time, for as long as the context lasts; an operation that has none is an
    error. To be entered before CUDA's first product. Afterwards all is as it was."""
    if not wanted:
        yield
        return
    workspace, benchmark = os.environ.get(WORKSPACE), torch.backends.cudnn.benchmark
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    os.environ.setdefault(WORKSPACE, FIXED)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(before, warn_only=warns)
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def guarantee(config: RunConfig, world: World) -> str:
    """What holds of a run that is stopped and goes on, or is done again: for environment.json and the log."""
    conditions = "at the same world size, with the same versions"
    if world.device.type != "cuda":
        exact = "bit-identical weights" if config.optimisation.precision == "fp32" else "the same up to rounding"
        return f"{exact} {conditions}"
    if config.engine.deterministic:
        several = "; NCCL adds in the same order while it finds the GPUs connected alike" if world.size > 1 else ""
        return f"bit-identical weights {conditions} on GPUs of the same model{several}"
    return "the same samples and pixels, weights up to rounding; engine.deterministic = true fixes it"
