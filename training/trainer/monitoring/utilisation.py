"""What a run's rate is measured against: operations of an image, and what the GPUs promise."""

from typing import Any, NamedTuple

import torch

from training.config.build import workload
from training.config.run_config import RunConfig
from training.core.world import World
from training.preflight.calculated import gpus
from training.preflight.calculated.operations import backbone_format, flops_of_image


class Yardstick(NamedTuple):
    """Equal on all ranks."""

    flops: float
    """Floating-point operations of a step for each image (`training/preflight/calculated/operations.py`)."""
    ranks: int
    peak: float = 0.0
    """Operations a second that the GPUs of all ranks reach together by their datasheets; 0: not known, or CPUs."""
    about: str = ""
    """What the peak is of, or why there is none; empty on CPUs."""
    complete: bool = True
    """False: the method does not say all of its products, and utilisation is known from below."""

    def of(self, images_per_s: float) -> dict[str, float]:
        """What a rate comes to, as it is recorded:

        model_tflops: 10^12 operations a second that each rank gets done, on average
        mfu:          share of what the datasheets promise (model FLOPs utilisation); only where that is known
        """
        rate = images_per_s * self.flops
        found = {"model_tflops": rate / self.ranks / gpus.TERA}
        return found | ({"mfu": rate / self.peak} if self.peak else {})

    def in_words(self) -> str:
        """A line for the start of a record."""
        count = f"{'' if self.complete else 'at least '}{self.flops / 1e9:,.1f} GFLOP an image"
        return f"{count}; {self.about}" if self.about else count

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record of an attempt."""
        return {"flops_of_image": self.flops, "peak_flops": self.peak or None, "about": self.about}


def yardstick(config: RunConfig, world: World) -> Yardstick:
    """For the GPUs that the ranks have; all ranks ask together."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return of_devices(config, world.all_gather(device))


def of_devices(config: RunConfig, devices: list[str]) -> Yardstick:
    """For GPUs of these names, rank by rank; empty names are CPUs."""
    precision = backbone_format(config)
    flops, complete = flops_of_image(config), workload(config, 1).products_complete
    bare = Yardstick(flops, len(devices), complete=complete)
    kinds = list(dict.fromkeys(devices))
    if "" in kinds:
        return bare
    known = {device: gpus.known(device) for device in kinds}
    missing = [device for device, gpu in known.items() if gpu is None or not gpu.peak(precision)]
    if missing:
        return bare._replace(about=f"utilisation is not told: no {precision} rate of {', '.join(missing)} is known")
    found = [gpu for gpu in known.values() if gpu is not None]
    rates = "; ".join(f"{gpu.peak(precision) / gpus.TERA:,.0f} TFLOP/s, {gpu.source}" for gpu in found)
    peak = sum(gpu.peak(precision) for device in devices if (gpu := known[device]) is not None)
    return bare._replace(peak=peak, about=f"MFU is the share of what {precision} has by datasheet: {rates}")
