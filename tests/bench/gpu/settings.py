"""Which recipes are tried, and with which settings: the published ones, but for batches that take seconds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config.batch_split import expected_workers, split_of
from training.config.build import workload
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.preflight.calculated.memory import Census, calculate, census
from training.recipes import SHIPPED

IDENTITIES = 751
"""Classes of a recipe that learns identities: Market-1501's."""
IMAGES = 2
"""In a batch that the CPU goes through, too."""
LEAST_LR = 1e-5
LUPERSON = 4_180_243
"""Images of an epoch."""


def recipes() -> list[str]:
    """All that come along, but for those that differ from others in the size of the batch alone."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml") if not path.stem.endswith("_4096"))


def file_of(recipe: str) -> Path:
    """A recipe's file, given by its path or by the name of one that comes along."""
    return Path(recipe) if recipe.endswith(".toml") else SHIPPED / f"{recipe}.toml"


def settled(name: str, *, tiny: bool = False) -> RunConfig:
    """A recipe for one process without data: plain stepper, no pretrained weights, nothing compiled or scored.

    `tiny`: two narrow blocks on small images, few prototypes; for trying the bench itself.
    """
    config = load(file_of(name))
    method: Any = config.method
    if method.name == "supervised":
        method = replace(method, classes=IDENTITIES)
    config = replace(
        config,
        method=method,
        backbone=replace(config.backbone, compile_blocks=False),
        engine=replace(config.engine, stepper="plain"),
        cluster=replace(config.cluster, max_workers=1),
        samples_per_epoch=config.samples_per_epoch or LUPERSON,
    )
    return _tiny(config) if tiny else config


def small(config: RunConfig) -> RunConfig:
    """Batches that a CPU goes through in seconds. No warm-up: steps that move nothing prove nothing. The learning rate
    falls with the batch, as published, but not below LEAST_LR."""
    before = config.optimisation
    batch = getattr(config.method, "instances", IMAGES)
    lr = max(before.lr * batch / before.batch, LEAST_LR)
    return replace(config, optimisation=replace(before, batch=batch, micro_batch=batch, lr=lr, warmup_epochs=0.0))


def full(name: str, config: RunConfig, sizes: Census, gpu: int) -> RunConfig:
    """One micro-batch a step, as one of the recipe's workers takes it; halved until it fits into `gpu` bytes. All that
    learns does so from the first step on, so that memory is that of the whole run."""
    method: Any = config.method
    if hasattr(method, "freeze_last_layer_epochs"):
        config = replace(config, method=replace(method, freeze_last_layer_epochs=0))
    before = load(file_of(name))
    split = split_of(before, expected_workers(before))
    micro = min(split.micro_batch, config.optimisation.micro_batch or split.micro_batch)  # 0: all of a worker's
    while True:
        optimisation = replace(config.optimisation, batch=micro, micro_batch=micro)
        made = replace(config, optimisation=optimisation)
        if micro == 1 or calculate(made, sizes, world=1, cuda=True).needed <= gpu:
            return made
        micro = math.ceil(micro / 2)


def work(config: RunConfig, sizes: Census) -> float:
    """How much a step on the small batch takes, next to other recipes: parameters times tokens."""
    stacks = workload(small(config), small(config).optimisation.batch).student
    return float(sizes.student["blocks"] * sum(stack.rows * stack.tokens for stack in stacks))


def smallest_first(names: Sequence[str], *, tiny: bool) -> list[tuple[str, RunConfig, Census]]:
    """The recipes with their sizes, in the order of `work`: what time is too short for are the large ones."""
    found = [(name, config, census(config)) for name in names for config in [settled(name, tiny=tiny)]]
    return sorted(found, key=lambda one: work(one[1], one[2]))


def _tiny(config: RunConfig) -> RunConfig:
    method: Any = config.method
    if method.name == "personmae":
        method = replace(method, pixel_width=32, feature_width=32, decoder_depth=1, decoder_heads=2)
    elif method.name != "supervised":
        method = replace(method, local_size=(32, 16), head=replace(method.head, out_dim=64, hidden=64, bottleneck=16))
    backbone = replace(config.backbone, arch="custom", size=(64, 32), patch=8, width=32, depth=2, heads=2)
    return replace(config, method=method, backbone=backbone, optimisation=replace(config.optimisation, micro_batch=8))
