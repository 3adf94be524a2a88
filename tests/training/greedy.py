"""A worker whose forward pass wants more memory than any machine has: allocators refuse it for real. Ray calls
`install` in each worker before it trains."""

import torch

import training.nn.vision_transformer
from tests.end_to_end.pause import HOOK

TOO_MANY = 1 << 50
"""Bytes."""
ENVIRONMENT = f"{HOOK}=tests.training.greedy.install"
"""For `--cluster.environment`."""


def install() -> None:
    training.nn.vision_transformer.VisionTransformer.outputs = lambda *_, **__: torch.empty(TOO_MANY)  # type: ignore[assignment]
