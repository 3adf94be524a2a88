"""A recipe on a data set: all that follows from the two, worked out once and passed on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datapipe.core.errors import ConfigError, DataError
from datapipe.core.randomness import Ints
from datapipe.sampling.epoch_order import SampleOrder
from datapipe.sampling.identity_sampler import IdentityOrder, numbered
from datapipe.views.spec import ViewSpec
from training import methods
from training.config import bicubic
from training.config.batch_split import BatchSplit, split_of
from training.config.build import view_spec
from training.config.continuation import saved_config
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.clock import Clock
from training.methods.base import ByCluster, ByIdentity
from training.reid.settings import EvaluationConfig

if TYPE_CHECKING:
    from datapipe.stream.loader import Loader
    from datapipe.stream.mixed_stream import MixedStream
    from datapipe.stream.stream import Stream
    from datapipe.stream.training_data import Data


class Identities(NamedTuple):
    """Data whose batches are made up of identities, for a method that learns from them."""

    labels: Ints
    """[rows of the data set] numbered from 0; -1: takes no part."""
    order: IdentityOrder
    """Which sample comes when."""


@dataclass(frozen=True)
class RunPlan:
    """What a run is, whatever it runs on. Equal on all ranks."""

    config: RunConfig
    """With what only the data tells: how many identities there are, and how long an epoch is."""
    data: "Data"
    clock: Clock
    spec: ViewSpec
    """What the loader makes for the method."""
    split: BatchSplit
    """One rank's part of a global batch."""
    identities: Identities | None = field(default=None, compare=False)
    """None: batches are not made up of them."""
    opened: "Stream | MixedStream | None" = field(default=None, compare=False, repr=False)
    """The crops, where they had to be opened for that."""
    ranks: int = 1
    machines: int = field(default=1, compare=False)
    """That the ranks are on; 1 as long as that is not known."""

    @cached_property
    def stream(self) -> "Stream | MixedStream":
        """The crops, opened once in a process: what one reader has brought into the cache others find there."""
        from datapipe.stream.reading_plan import Readers

        if self.opened is not None:
            return self.opened
        shares = self.config.stream.assignment == "node" and self.identities is None
        readers = Readers(self.machines if shares else 1, self.ranks)
        return self.data.stream(self.config.storage, self.config.stream, readers)

    def order(self) -> SampleOrder:
        """Which sample comes when."""
        return self.identities.order if self.identities else self.data.order(self.config.seed, self.config.stream)


def plan_run(config: RunConfig, data: "Data", ranks: int, machines: int = 1) -> RunPlan:
    """All that follows from a recipe, its data and so many ranks on so many machines. Raises ConfigError or DataError
    where they do not go together."""
    from datapipe.stream.reading_plan import Readers

    identities, stream = None, None
    every_machine_reads_all = Readers(1, ranks)
    if (sampling := sampling_of(config)) is not None:
        stream = data.stream(config.storage, config.stream, every_machine_reads_all)
        identities = _identities(config, stream, sampling)
        config = _for_identities(config, sampling, identities.labels)
    if (clusters := clustered(config)) is not None:
        stream = data.stream(config.storage, config.stream, every_machine_reads_all)
        _refuse_unclustered(stream, clusters)
    config = for_clusters(config, data.rows)
    clock = clock_of(config, data.rows)
    split = split_of(config, ranks)
    return RunPlan(config, data, clock, view_spec(config), split, identities, stream, ranks, machines)


def clock_of(config: RunConfig, rows: int) -> Clock:
    """The run's clock over a data set of so many rows."""
    return Clock(
        batch=config.optimisation.batch,
        epoch_samples=config.samples_per_epoch or rows,
        epochs=config.optimisation.epochs,
        seed=config.seed,
    )


def steps_of(folder: RunFolder) -> int:
    """Steps of the whole run in this folder; 0 where the size of its data set is not known yet."""
    config, about = saved_config(folder), folder.read_record("environment.json")
    manifest = about.get("manifest")
    rows = manifest.get("rows") if isinstance(manifest, dict) else None
    return clock_of(config, rows).total_steps if config and isinstance(rows, int) and rows > 0 else 0


def milestone_ends(config: EvaluationConfig, clock: Clock) -> list[int]:
    """Samples seen at the end of each segment: whole steps, the nearest to every so many epochs, and the last one."""
    if not config.data or not config.every_epochs:
        return [clock.end]
    count = int(clock.total_steps / (config.every_epochs * clock.epoch_steps))
    steps = (round(number * config.every_epochs * clock.epoch_steps) for number in range(1, count + 1))
    return sorted({clock.end, *(step * clock.batch for step in steps if 0 < step < clock.total_steps)})


def make_loader(plan: RunPlan, world: World) -> "Loader":
    """This rank's batches."""
    from datapipe.stream.loader import Loader

    config = plan.config
    return Loader(
        plan.stream,
        plan.order(),
        plan.spec,
        seed=config.seed,
        global_batch=config.optimisation.batch,
        rank=world.rank,
        world=world.size,
        micro_batch=plan.split.micro_batch,
        config=config.stream,
        allocate=_pinned if world.device.type == "cuda" else np.empty,
        lock=_locked if world.device.type == "cuda" else None,
        ranks_here=world.local_size,
        nodes=world.nodes() if config.stream.assignment == "node" else (),
        labels=plan.identities.labels if plan.identities else None,
        resize=bicubic.fastest(),
    )


def sampling_of(config: RunConfig) -> ByIdentity | None:
    """How the recipe's batches are made up of identities, if they are. Raises ConfigError where the batch does not
    divide."""
    sampling = methods.of(config.method).by_identity(config.method)
    if sampling is not None and config.optimisation.batch % sampling.instances:
        raise ConfigError(f"a batch of {config.optimisation.batch} is not whole identities of {sampling.instances} "
                          "images each", where="optimisation.batch, method.instances",
                          hint="a batch that is a multiple of method.instances")  # fmt: skip
    return sampling


def for_clusters(config: RunConfig, rows: int) -> RunConfig:
    """The recipe for so many training images where it makes pseudo labels, whose epochs are so many steps; others as
    they are."""
    clusters = clustered(config)
    if clusters is None:
        return config
    method = methods.of(config.method).for_images(config.method, rows)
    return replace(config, method=method, samples_per_epoch=clusters.iterations * config.optimisation.batch)


def clustered(config: RunConfig) -> ByCluster | None:
    """How the recipe's pseudo labels are made, if they are. Raises ConfigError where the batch does not divide."""
    clusters = methods.of(config.method).by_cluster(config.method)
    if clusters is None:
        return None
    for number, what in ((clusters.instances, "method.instances"), (max(1, clusters.group), "method.norm_group")):
        if config.optimisation.batch % number:
            raise ConfigError(f"a batch of {config.optimisation.batch} is not a multiple of {number}",
                              where=f"optimisation.batch, {what}",
                              hint=f"a batch that is a multiple of {what}")  # fmt: skip
    return clusters


def _refuse_unclustered(stream: "Stream | MixedStream", clusters: ByCluster) -> None:
    """Raises DataError where there are too few images to cluster, ConfigError where cameras are wanted and unknown."""
    if stream.rows < clusters.clustering.k1:
        raise DataError(f"{stream.rows} images are fewer than the {clusters.clustering.k1} neighbours of an image",
                        where="method.clustering.k1", hint="a smaller k1, or a larger data set")  # fmt: skip
    unknown = int((stream.camera < 0).sum()) if clusters.cameras else 0
    if unknown:
        raise ConfigError(
            f"batches show a cluster from several cameras, and {unknown:,} of {stream.rows:,} images have none",
            where="method.cameras", hint="--method.cameras False draws from all images of a cluster",
        )  # fmt: skip


def _identities(config: RunConfig, stream: "Stream | MixedStream", sampling: ByIdentity) -> Identities:
    """Raises DataError where there are too few for a batch."""
    labels = numbered(stream.pid, fraction=sampling.fraction, seed=config.seed)
    count = config.optimisation.batch // sampling.instances
    return Identities(labels, IdentityOrder(labels, seed=config.seed, identities=count, instances=sampling.instances))


def _for_identities(config: RunConfig, sampling: ByIdentity, labels: Ints) -> RunConfig:
    """The recipe with how many identities there are, and how long an epoch is, as the reference's sampler has it
    (TransReID `datasets/sampler.py`):

        epoch = sum over identities of max(K, images - images mod K)

    Raises ConfigError where the recipe says otherwise.
    """
    images = np.bincount(labels[labels >= 0])
    method = methods.of(config.method).for_identities(config.method, len(images))
    epoch = int(np.maximum(sampling.instances, images - images % sampling.instances).sum())
    return replace(config, method=method, samples_per_epoch=config.samples_per_epoch or epoch)


def _locked(array: np.ndarray) -> Callable[[], None]:
    """Lock the pages of memory that processes share, as `_pinned` has its own. Returns what unlocks them."""
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(int(cuda.cudaHostRegister(array.ctypes.data, array.nbytes, 0)))
    return lambda: torch.cuda.check_error(int(cuda.cudaHostUnregister(array.ctypes.data)))


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, which copies to the GPU beside the computation."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()
