"""What a rate comes to beside the GPU's datasheet: operations of an image, utilisation, and the calculated time."""

from typing import Any

import torch

from training.config.run_config import RunConfig
from training.preflight import gpus
from training.preflight.memory import Census
from training.preflight.operations import backbone_format, flops_of_image
from training.preflight.step_time import USUAL, Share, machine_of, step_time


def beside_datasheet(config: RunConfig, sizes: Census, images_per_s: float, device: str) -> dict[str, Any]:
    """Figures of a step of `config` in one process. `device`: as the driver names it; utilisation ("mfu") and
    calculated milliseconds are None where no datasheet of it is known, or none for this precision."""
    flops, gpu = flops_of_image(config), gpus.known(device)
    figures: dict[str, Any] = {"gflop_per_image": flops / 1e9, "tflops": images_per_s * flops / gpus.TERA}
    peak = gpu.peak(backbone_format(config)) if gpu else 0.0
    if gpu is None or not peak:
        return figures | {"mfu": None, "calculated_ms": None, "calculated_ms_of": {}}
    found = step_time(config, sizes, machine_of(gpu, USUAL), Share(1, 1, torch.get_num_threads()))
    parts = {name: 1_000 * part.seconds for name, part in found.parts.items() if name != "checkpoint"}
    return figures | {"mfu": images_per_s * flops / peak, "calculated_ms": sum(parts.values()),
                      "calculated_ms_of": parts}  # fmt: skip
