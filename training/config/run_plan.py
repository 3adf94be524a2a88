"""A recipe on a data set: all that follows from the two, worked out once and passed on."""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datapipe.core.errors import ConfigError
from datapipe.core.randomness import Ints
from datapipe.sampling.epoch_order import SampleOrder
from datapipe.sampling.identity_sampler import IdentityOrder, numbered
from datapipe.views.spec import ViewSpec
from training import methods
from training.config.batch_split import Portion, portion
from training.config.build import view_spec
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.clock import Clock
from training.methods.base import ByIdentity

if TYPE_CHECKING:
    from datapipe.stream.loader import Loader
    from datapipe.stream.mixed_stream import MixedStream
    from datapipe.stream.stream import Stream
    from datapipe.stream.training_data import Data


@dataclass(frozen=True)
class RunPlan:
    """What a run is, whatever it runs on. Equal on all ranks."""

    config: RunConfig
    """With what only the data tells (see `resolved`)."""
    data: "Data"
    clock: Clock
    spec: ViewSpec
    """What the loader makes for the method."""

    def share(self, ranks: int) -> Portion:
        """One rank's part of a global batch, of so many ranks."""
        return portion(self.config.optimisation.batch, self.config.optimisation.micro_batch, ranks)


def plan_run(config: RunConfig, data: "Data") -> RunPlan:
    """Raises ConfigError or DataError where recipe and data do not go together."""
    config = resolved(config, data)
    return RunPlan(config, data, clock_of(config, data.rows), view_spec(config))


def clock_of(config: RunConfig, rows: int) -> Clock:
    """The run's clock over a data set of so many rows."""
    return Clock(
        batch=config.optimisation.batch,
        epoch_samples=config.samples_per_epoch or rows,
        epochs=config.optimisation.epochs,
        seed=config.seed,
    )


def make_loader(plan: RunPlan, world: World) -> "Loader":
    """This rank's batches."""
    from datapipe.stream.loader import Loader

    config = plan.config
    stream = plan.data.stream(config.storage, config.stream)
    return Loader(
        stream,
        order_of(config, plan.data, stream),
        plan.spec,
        seed=config.seed,
        global_batch=config.optimisation.batch,
        rank=world.rank,
        world=world.size,
        micro_batch=plan.share(world.size).micro,
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
    sampling = methods.of(config.method).by_identity(config.method)
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
    method = methods.of(config.method).for_identities(config.method, len(images))
    epoch = int(np.maximum(sampling.instances, images - images % sampling.instances).sum())
    return replace(config, method=method, samples_per_epoch=config.samples_per_epoch or epoch)


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, which copies to the GPU beside the computation."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()
