"""Number formats of a run: what autocast lowers, and where values stay at least float32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from datapipe.core.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
"""What autocast lowers matrix products to. Parameters are float32 (float64 on the yardstick) in every case."""


def autocast_region(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The region where matrix products run in `precision`. Parameters and residual streams stay float32."""
    refuse_fp16_on_cpu(precision, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def casts_kept(device: torch.device) -> AbstractContextManager[None]:
    """The region around several passes over the same weights, which must not change in it: what autocast regions inside
    have lowered of trained weights is kept for the next of them. Same numbers: each gradient still goes through the
    cast, and is added up in the weight's own precision. Outside those regions nothing is lowered."""
    return torch.autocast(device.type, enabled=False)  # autocast empties its cache when the outermost region ends


def refuse_fp16_on_cpu(precision: Precision, device: torch.device) -> None:
    """Raises ConfigError."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU: on a CPU float16 products are slow and their gradients vanish",
                          where="optimisation.precision", hint='precision = "bf16" or "fp32"')  # fmt: skip


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """May a GPU's float32 products and convolutions, forward and backward, use TF32? For as long as the context lasts;
    afterwards all is as it was. torch alone allows it to convolutions and not to products."""
    places: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """The region for heads and losses, where autocast is off."""
    return torch.autocast(device.type, enabled=False)


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
