"""Where settings become objects: each is made here, by one function, from the recipe and what it needs.

What reads data sets is imported where it is used: a method, its stepper and a batch of noise need no library for data.
"""

import math
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datapipe.batch import Batch
from datapipe.errors import ConfigError
from datapipe.identities import IdentityOrder, numbered
from datapipe.masking import draw_masks
from datapipe.order import SampleOrder
from datapipe.randomness import Ints, words
from datapipe.view_spec import ViewSpec
from training import methods
from training.engine.clock import Clock
from training.engine.optimisation import group_parameters
from training.engine.plain import PlainStepper
from training.engine.stepper import Stepper
from training.engine.world import World
from training.initial_weights import start_from
from training.methods.base import ByIdentity, Method
from training.run_config import RunConfig

if TYPE_CHECKING:
    from datapipe.data import Data
    from datapipe.loader import Loader
    from datapipe.mixed_stream import MixedStream
    from datapipe.preview import TrainingViews
    from datapipe.stream import Stream


class Portion(NamedTuple):
    """One rank's share of a global batch."""

    rows: int
    """Images per rank, padding included; a multiple of `micro`."""
    micro: int
    """Images taken through forward and backward at once."""


def portion(batch: int, micro_batch: int, world: int) -> Portion:
    """Equal shares for all ranks in equal micro-batches, with as little padding as that allows. `micro_batch` 0: each
    share in one."""
    share = math.ceil(batch / world)
    pieces = math.ceil(share / micro_batch) if micro_batch else 1
    micro = math.ceil(share / pieces)
    return Portion(micro * pieces, micro)


def clock_of(config: RunConfig, rows: int) -> Clock:
    """The run's clock over a data set of so many rows."""
    return Clock(
        batch=config.optimisation.batch,
        epoch_samples=config.samples_per_epoch or rows,
        epochs=config.optimisation.epochs,
        seed=config.seed,
    )


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
    return methods.METHODS[config.method.name].views(config.method, config.views, config.backbone)


def training_views(config: RunConfig) -> "TrainingViews":
    """The same with seed and order, for `python -m datapipe preview`."""
    from datapipe.preview import TrainingViews

    return TrainingViews(view_spec(config), config.seed, config.stream.block, config.stream.window)


def make_stepper(config: RunConfig, method: Method, world: World, share: Portion) -> Stepper:
    """The recipe's stepper around the method."""
    groups = group_parameters(method, layer_decay=config.optimisation.layer_decay)
    if config.engine.stepper == "plain":
        return PlainStepper(method, groups, config.optimisation, world)
    from training.engine.deepspeed import DeepSpeedStepper

    settings = deepspeed_json(config, world, share)
    return DeepSpeedStepper(method, groups, config.optimisation, world, settings=settings)


def deepspeed_json(config: RunConfig, world: World, share: Portion) -> dict[str, Any]:
    """The complete DeepSpeed configuration that the recipe amounts to."""
    from training.engine.deepspeed import derive_json

    return derive_json(config.engine, rows=share.rows, micro=share.micro, world=world.size)


def make_loader(config: RunConfig, data: "Data", world: World, share: Portion) -> "Loader":
    from datapipe.loader import Loader

    stream = data.stream(config.storage, config.stream)
    return Loader(
        stream,
        order_of(config, data, stream),
        view_spec(config),
        seed=config.seed,
        global_batch=config.optimisation.batch,
        rank=world.rank,
        world=world.size,
        micro_batch=share.micro,
        config=config.stream,
        allocate=_pinned if world.device.type == "cuda" else np.empty,
        ranks_here=world.local_size,
        nodes=world.nodes() if config.stream.assignment == "node" else (),
        labels=labels_of(config, stream.pid),
    )


def order_of(config: RunConfig, data: "Data", stream: "Stream | MixedStream") -> SampleOrder:
    """Which sample comes when. Raises DataError where there are too few identities for a batch of them."""
    sampling = sampling_of(config)
    if sampling is None:
        return data.order(config.seed, config.stream)
    identities = config.optimisation.batch // sampling.instances
    labels = labels_of(config, stream.pid)
    return IdentityOrder(labels, seed=config.seed, identities=identities, instances=sampling.instances)


def labels_of(config: RunConfig, pids: Ints) -> Ints:
    """Every row's label as the method gets it: what the index says, or numbers from 0 where batches are made up of
    identities, -1 for those that take no part."""
    sampling = sampling_of(config)
    return pids if sampling is None else numbered(pids, fraction=sampling.fraction, seed=config.seed)


def sampling_of(config: RunConfig) -> ByIdentity | None:
    """How the recipe's batches are made up of identities, if they are. Raises ConfigError where the batch does not
    divide."""
    sampling = methods.METHODS[config.method.name].by_identity(config.method)
    if sampling is not None and config.optimisation.batch % sampling.instances:
        raise ConfigError(f"a batch of {config.optimisation.batch} is not whole identities of {sampling.instances} "
                          "images each", where="optimisation.batch, method.instances",
                          hint="a batch that is a multiple of method.instances")  # fmt: skip
    return sampling


def resolved(config: RunConfig, data: "Data") -> RunConfig:
    """The recipe with what only the data tells: for methods that learn from identities how many there are, and how
    long an epoch is, as the reference's sampler has it (TransReID `datasets/sampler.py`).

        epoch = sum over identities of max(K, images - images mod K)

    Raises ConfigError where the recipe says otherwise, DataError where there are too few identities for a batch.
    """
    sampling = sampling_of(config)
    if sampling is None:
        return config
    with closing(data.stream(config.storage, config.stream)) as stream:
        labels = labels_of(config, stream.pid)
        order_of(config, data, stream)  # refuses too few identities
    images = np.bincount(labels[labels >= 0])
    method: Any = config.method
    if method.classes not in (0, len(images)):
        raise ConfigError(f"the recipe is for {method.classes} identities, the data has {len(images)}",
                          where="method.classes", hint="0: as many as there are")  # fmt: skip
    epoch = int(np.maximum(sampling.instances, images - images % sampling.instances).sum())
    method = replace(method, classes=len(images))
    return replace(config, method=method, samples_per_epoch=config.samples_per_epoch or epoch)


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, which copies to the GPU beside the computation."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()


def fake_batch(spec: ViewSpec, share: Portion, config: RunConfig) -> Batch:
    """A batch of noise in the shape of real ones, for the rehearsal."""
    n = share.micro
    views = {}
    for group in spec.groups:
        shape = spec.shape(group, n)
        values = math.prod(shape[2:])  # of one image; a word makes eight
        noise = words(config.seed, f"rehearsal/{group.name}", np.arange(shape[0] * n), math.ceil(values / 8))
        views[group.name] = np.ascontiguousarray(noise).view(np.uint8)[:, :values].reshape(shape)
    rows = np.arange(n, dtype=np.int64)
    return Batch(
        views=views, sample=rows, position=rows, weight=np.full(n, 1 / n), label=rows % 2, camera=rows,
        start=0, after=n, waited_s=0.0,
        masks=draw_masks(spec.masks, config.seed, rows) if spec.masks else None,
        boxes=np.broadcast_to([0, 0, *config.backbone.size, 0], (spec.boxed, n, 5)).copy() if spec.boxed else None,
    )  # fmt: skip
