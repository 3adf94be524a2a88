"""From the loader's uint8 slots to normalised tensors on the device."""

import numpy as np
import torch
from torch import Tensor

from datapipe.core.config import Statistics
from datapipe.stream.batch import Batch
from datapipe.views.normalisation import MEAN_STD
from training.core.device_copy import to_device
from training.methods.base import Views


class BatchToDevice:
    """Copies one micro-batch to the device and normalises it there: (value / 255 - mean) / std.

    The host never waits for a GPU. What only keys random numbers or is written to logs stays on the host.
    """

    def __init__(
        self, device: torch.device, statistics: Statistics = "imagenet", *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = device, dtype
        shape, (mean, std) = (3, 1, 1), MEAN_STD[statistics]
        scale = 255 * torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / scale).reshape(shape).to(device, dtype)
        self._shift = (-255 * torch.tensor(mean, dtype=torch.float64) / scale).reshape(shape).to(device, dtype)

    def __call__(self, batch: Batch) -> Views:
        views: Views = {
            "sample": torch.from_numpy(batch.sample.copy()),
            "position": torch.from_numpy(batch.position.copy()),
            "label": to_device(batch.label.copy(), self.device),
            "camera": to_device(batch.camera.copy(), self.device),
            "weight": to_device(batch.weight.copy(), self.device, self.dtype),
        }
        if batch.masks is not None:
            views["mask"] = to_device(batch.masks, self.device)
            views["hidden"] = to_device(np.flatnonzero(batch.masks), self.device)
        if batch.boxes is not None:
            views["boxes"] = to_device(batch.boxes, self.device)
        for name, pixels in batch.views.items():
            views[name] = self._normalised(pixels)  # type: ignore[literal-required]
        return views

    def _normalised(self, pixels_VBHWI: np.ndarray) -> Tensor:
        moved = self._moved(pixels_VBHWI).permute(0, 1, 4, 2, 3)
        return torch.addcmul(self._shift, moved.to(self.dtype, memory_format=torch.contiguous_format), self._scale)

    def _moved(self, pixels: np.ndarray) -> Tensor:
        """On the device. To a GPU view by view: of a micro-batch only these are in one piece, and only such pinned
        memory is copied beside the computation. The step ends with a wait for the GPU, long before a slot is reused."""
        if self.device.type != "cuda":
            return torch.from_numpy(pixels).to(self.device)
        moved = torch.empty(pixels.shape, dtype=torch.uint8, device=self.device)
        for view, source in zip(moved, pixels, strict=True):
            view.copy_(torch.from_numpy(source), non_blocking=True)
        return moved
