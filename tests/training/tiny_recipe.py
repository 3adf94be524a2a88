"""Published recipes with everything made tiny but their structure, for tests that go through a method without data."""

from dataclasses import replace
from typing import Any

import torch

from training.config.batch_split import split_batch
from training.config.build import fake_batch, initial_method, view_spec
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.methods.base import Method, Views
from training.recipes import SHIPPED
from training.trainer.batch_to_device import BatchToDevice


def tiny(name: str, *, images: int, precision: Any = "fp32", **backbone: Any) -> RunConfig:
    """A recipe on 8 x 4 patches, width 24, two blocks; one batch of `images` in one micro-batch, on the CPU."""
    config = load(SHIPPED / f"{name}.toml")
    method = config.method
    if method.name == "personmae":
        method = replace(method, pixel_width=32)
    else:
        method = replace(method, local_size=(32, 16), head=replace(method.head, out_dim=96, hidden=40, bottleneck=20))
    return replace(
        config,
        backbone=replace(
            config.backbone, arch="custom", size=(64, 32), patch=8, width=24, depth=2, heads=3, **backbone
        ),
        method=method,
        optimisation=replace(config.optimisation, batch=images, micro_batch=images, precision=precision),
        engine=replace(config.engine, stepper="plain", device="cpu", bucket=1_000),
        cluster=replace(config.cluster, max_workers=1),
        samples_per_epoch=100 * images,
    )


def with_views(config: RunConfig) -> tuple[Method, Views]:
    """Its method, freshly initialised, and a micro-batch of noise."""
    method, _ = initial_method(config)
    images = config.optimisation.batch
    batch = fake_batch(view_spec(config), split_batch(images, images, 1), config)
    return method, BatchToDevice(torch.device("cpu"))(batch)
