"""From the host's memory to a device without making the host wait."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on the device, as `dtype` if given, cast on the host.

    To a GPU through pinned memory, beside the computation: the host goes on at once, and may overwrite `values` at
    once. Copies from ordinary memory wait for all work that the GPU was given before. To the CPU nothing is copied.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    dtype = dtype or tensor.dtype
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor).to(device, non_blocking=True)
