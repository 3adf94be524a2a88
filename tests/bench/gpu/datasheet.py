"""What a rate comes to beside the GPU's datasheet and beside a large matrix product measured on it: operations of an
image, utilisation, and the calculated time."""

import statistics
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from training.config.run_config import RunConfig
from training.core.precision import tf32_products
from training.preflight.calculated import gpus
from training.preflight.calculated.machine import USUAL, machine_of
from training.preflight.calculated.memory import Census
from training.preflight.calculated.operations import backbone_format, flops_of_image
from training.preflight.calculated.step_time import Share, step_time

SIDE = 8_192
"""Of the square matrices that are multiplied to see what a GPU reaches."""
GPUS = 8
"""Of one machine, for which it is calculated what a step would wait for the sum of gradients."""
DTYPES: dict[gpus.Format, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


@cache
def product_rate(precision: gpus.Format, device: torch.device, side: int = SIDE) -> float:
    """Operations a second in a product of two such matrices: the median of ten, after three."""
    values = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    result, events = torch.empty_like(values), []
    with tf32_products(precision == "tf32"):
        for _ in range(14):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)
            torch.mm(values, values, out=result)
    torch.cuda.synchronize(device)
    took = [one.elapsed_time(other) for one, other in zip(events[3:], events[4:], strict=False)]
    return 2 * side**3 / (statistics.median(took) / 1_000)


def beside_datasheet(config: RunConfig, sizes: Census, images_per_s: float, device: str) -> dict[str, Any]:
    """Figures of a step of `config` in one process, and what one would wait for the sum of gradients with `GPUS` such
    processes. `device`: as the driver names it; utilisation ("mfu") and calculated milliseconds are None where no
    datasheet of it is known, or none for this precision."""
    flops, gpu = flops_of_image(config), gpus.known(device)
    figures: dict[str, Any] = {"gflop_per_image": flops / 1e9, "tflops": images_per_s * flops / gpus.TERA}
    peak = gpu.peak(backbone_format(config)) if gpu else 0.0
    if gpu is None or not peak:
        return figures | {"mfu": None, "calculated_ms": None, "calculated_ms_of": {}, f"reduce_ms_of_{GPUS}": None}
    found, many = (
        step_time(_of_processes(config, count), sizes, machine_of(gpu, USUAL), Share(count, 1, torch.get_num_threads()))
        for count in (1, GPUS)
    )
    parts = {name: 1_000 * part.seconds for name, part in found.parts.items() if name != "checkpoint"}
    return figures | {"mfu": images_per_s * flops / peak, "calculated_ms": sum(parts.values()),
                      "calculated_ms_of": parts,
                      f"reduce_ms_of_{GPUS}": 1_000 * many.parts["reduce"].seconds}  # fmt: skip


def _of_processes(config: RunConfig, count: int) -> RunConfig:
    """Each of them with the images that one has now."""
    return replace(config, optimisation=replace(config.optimisation, batch=count * config.optimisation.batch))
