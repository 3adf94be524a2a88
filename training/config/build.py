"""Where settings become objects: each is made here, by one function, from the recipe and what it needs.

What reads data sets is imported where it is used: a method, its stepper and a batch of noise need no library for data.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import training.nn.blocks  # noqa: F401  (loads timm, which does more where a device or a fake mode is set)
from datapipe.core.randomness import words
from datapipe.stream.batch import Batch
from datapipe.views.erasing import Erasures, draw_erasures
from datapipe.views.masking import draw_masks
from datapipe.views.spec import ViewSpec
from training import methods
from training.config.batch_split import BatchSplit
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.stepper import Stepper
from training.methods.base import Method
from training.nn.workload import Workload
from training.weights.initialise import start_from

if TYPE_CHECKING:
    from datapipe.stream.preview import TrainingViews


def initial_method(config: RunConfig) -> tuple[Method, dict[str, Any]]:
    """The recipe's method as the run starts with it, a function of the seed and of the weights under `init`; and what
    these are."""
    method = build_method(config)
    if not config.init.weights:
        return method, {}
    return method, start_from(method, config.init, config.backbone, config.storage, statistics=config.views.statistics)


def build_method(config: RunConfig) -> Method:
    """The recipe's method with random weights that are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = methods.build(config.method, config.backbone)
    method.precision = config.optimisation.precision
    return method


def view_spec(config: RunConfig) -> ViewSpec:
    """What the loader must make for the recipe's method."""
    return methods.of(config.method).views(config.method, config.views, config.backbone)


def workload(config: RunConfig, images: int) -> Workload:
    """What a micro-batch of so many images is to the networks of the recipe's method."""
    return methods.of(config.method).workload(config.method, config.views, config.backbone, images)


def training_views(config: RunConfig) -> "TrainingViews":
    """`view_spec` with seed and order of the stream, for `python -m datapipe preview`."""
    from datapipe.stream.preview import TrainingViews

    return TrainingViews(view_spec(config), config.seed, config.stream.block, config.stream.window)


def allows_tf32(config: RunConfig) -> bool:
    """May float32 products on a GPU use TF32 under this recipe? (`training.core.precision.tf32_products`)"""
    tf32 = config.engine.tf32
    return config.optimisation.precision != "fp32" if tf32 == "auto" else tf32 == "on"


def why_uncompiled(config: RunConfig, *, cuda: bool) -> str:
    """Why blocks are not compiled under this recipe, whatever the machine; empty: they are, or "auto" tries it."""
    asked, engine = config.backbone.compile_blocks, config.engine
    if asked is True:
        return ""
    if asked is False:
        return "compile_blocks = false"
    if not cuda:
        return "no GPU"
    if engine.stepper == "deepspeed" and engine.zero_stage == 3:
        return "zero_stage 3 fetches parameters layer by layer"
    if engine.deterministic:
        return "engine.deterministic: their kernels are chosen by timing"
    return ""


def make_stepper(config: RunConfig, method: Method, world: World, split: BatchSplit) -> Stepper:
    """The recipe's stepper around the method."""
    groups = group_parameters(method, layer_decay=config.optimisation.layer_decay)
    if config.engine.stepper == "plain":
        return PlainStepper(method, groups, config.optimisation, world)
    from training.engine.deepspeed import DeepSpeedStepper

    settings = deepspeed_json(config, world, split)
    return DeepSpeedStepper(method, groups, config.optimisation, world, settings=settings)


def deepspeed_json(config: RunConfig, world: World, split: BatchSplit) -> dict[str, Any]:
    """The complete DeepSpeed configuration that the recipe amounts to."""
    from training.engine.deepspeed import derive_json

    return derive_json(config.engine, rows=split.per_rank, micro=split.micro_batch, world=world.size,
                       reduction=config.optimisation.reduction, cuda=world.device.type == "cuda")  # fmt: skip


def fake_batch(spec: ViewSpec, split: BatchSplit, config: RunConfig) -> Batch:
    """A batch of noise in the shape of real ones, for the rehearsal."""
    n = split.micro_batch
    views = {}
    for group in spec.groups:
        shape = spec.shape(group, n)
        values = math.prod(shape[2:])  # of one image; a word makes eight
        noise = words(config.seed, f"rehearsal/{group.name}", np.arange(shape[0] * n), math.ceil(values / 8))
        views[group.name] = np.ascontiguousarray(noise).view(np.uint8)[:, :values].reshape(shape)
    rows = np.arange(n, dtype=np.int64)
    erasures = Erasures.none(spec.erasing, n) if spec.erasing else None
    if spec.erasing and erasures:
        draw_erasures(spec.erasing, config.seed, rows, erasures)
    return Batch(
        views=views, sample=rows, position=rows, weight=np.full(n, 1 / n), label=rows % 2, camera=rows,
        start=0, after=n, waited_s=0.0,
        masks=draw_masks(spec.masks, config.seed, rows) if spec.masks else None,
        boxes=np.broadcast_to([0, 0, *config.backbone.size, 0], (spec.boxed, n, 5)).copy() if spec.boxed else None,
        erasures=erasures,
    )  # fmt: skip
