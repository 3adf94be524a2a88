"""From the loader's uint8 slots to normalised tensors on the device."""

import numpy as np
import torch
from torch import Tensor

from datapipe.core.config import Statistics
from datapipe.stream.batch import Batch
from datapipe.views.normalisation import MEAN_STD
from training.core.device_copy import CopyStream, DeviceSlot
from training.methods.base import Views


class BatchToDevice:
    """Copies one micro-batch to the device and normalises it there: (value / 255 - mean) / std.

    The host never waits for a GPU. To a GPU copies go beside the computation, and views are normalised in its stream.
    What only keys random numbers or is written to logs stays on the host.
    """

    def __init__(
        self, device: torch.device, statistics: Statistics = "imagenet", *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = device, dtype
        shape, (mean, std) = (3, 1, 1), MEAN_STD[statistics]
        scale = 255 * torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / scale).reshape(shape).to(device, dtype)
        self._shift = (-255 * torch.tensor(mean, dtype=torch.float64) / scale).reshape(shape).to(device, dtype)
        self._copies = CopyStream(device) if device.type == "cuda" else None
        self._begun: tuple[Batch, DeviceSlot] | None = None

    def ahead(self, batch: Batch) -> None:
        """Start the copy of the micro-batch that will be asked for next. Until `settle` its views stay as they are."""
        if self._copies is not None:
            self._begun = batch, self._copies.begin(self._small(batch), _pixels(batch))

    def settle(self) -> None:
        """Wait for copies, and for nothing else: the loader may overwrite all batches that were handed over."""
        if self._copies is not None:
            self._copies.settle()

    def __call__(self, batch: Batch) -> Views:
        views: Views = {
            "sample": torch.from_numpy(batch.sample.copy()),
            "position": torch.from_numpy(batch.position.copy()),
        }
        if batch.erasures is not None:
            views["erased"] = batch.erasures.rectangle.copy()
        if self._copies is None:
            return self._filled(views, self._small(batch), _pixels(batch))
        if self._begun is None or self._begun[0] is not batch:
            self.ahead(batch)
        assert self._begun is not None
        (_, slot), self._begun = self._begun, None
        with self._copies.reading(slot) as (small, pixels):
            return self._filled(views, small, pixels)

    def _filled(self, views: Views, small: dict[str, Tensor], pixels: dict[str, Tensor]) -> Views:
        """With what is on the device."""
        normalised = {name: self._normalised(value) for name, value in pixels.items()}
        return {**views, **small, **normalised}  # type: ignore[typeddict-item]

    def _small(self, batch: Batch) -> dict[str, Tensor]:
        """All but the views, on the host."""
        small = {
            "label": torch.from_numpy(batch.label.copy()),
            "camera": torch.from_numpy(batch.camera.copy()),
            "weight": torch.from_numpy(batch.weight.copy()).to(self.dtype),
        }
        if batch.masks is not None:
            small["mask"] = torch.from_numpy(batch.masks)
            small["hidden"] = torch.from_numpy(np.flatnonzero(batch.masks))
        if batch.boxes is not None:
            small["boxes"] = torch.from_numpy(batch.boxes)
        if batch.erasures is not None:
            small["noise"] = torch.from_numpy(batch.erasures.flat()).to(self.dtype)
        return small

    def _normalised(self, pixels_VBHWI: Tensor) -> Tensor:
        pixels = pixels_VBHWI.permute(0, 1, 4, 2, 3)
        return torch.addcmul(self._shift, pixels.to(self.dtype, memory_format=torch.contiguous_format), self._scale)


def _pixels(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(pixels) for name, pixels in batch.views.items()}
