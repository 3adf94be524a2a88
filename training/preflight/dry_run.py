"""What a run would be, without data and without starting anything: recipe, sizes, steps, memory, and what differs from
the publication."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from datapipe.core.errors import ConfigError, StorageError
from datapipe.stream.reading_plan import ReadingPlan
from datapipe.stream.training_data import Data, load_data
from training import methods
from training.checkpoint import retention
from training.config.batch_split import MACHINE_GPUS, expected_workers, most_useful, split_of
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of, clustered, for_clusters, milestone_ends, plan_run, sampling_of
from training.engine.clock import Clock
from training.preflight.calculated import gpus, memory
from training.preflight.calculated.communication import Traffic, traffic
from training.preflight.calculated.gpus import Gpu
from training.preflight.calculated.memory import Census, Memory
from training.preflight.calculated.step_time import CORES, Forecast, Share, forecast, forecast_here
from training.preflight.checks import refuse_split, refuse_unsuited
from training.preflight.cpu_forecast import measured_machine
from training.preflight.deviations import Deviations, compare

LUPERSON = 4_180_243
"""Images of LUPerson, on which the published runs were trained."""
MARKET, MARKET_IDENTITIES = 12_936, 751
"""Training images of Market-1501 and the identities on them, for training on a labelled data set."""
GB = 10**9
COMMON = ("A100 SXM 80 GB", "H100 SXM")
"""GPUs that time is calculated for where there is none and none is named."""
MACHINES = (1, 2, 8, 16, 32, 64)
"""Numbers of machines of 8 GPUs that a step is spread over in calculation."""
PATIENCE_S = 5.0
"""Seconds that a store of a data set has to answer: a dry run needs none, so it waits for none."""


class Steps(NamedTuple):
    """How long a run is, and how its batches are split."""

    rows: int
    """Images of the data set."""
    known_from: str
    """Where `rows` is from."""
    epoch_samples: int
    per_epoch: float
    total: int
    warmup: float
    images: int
    """Seen in the whole run."""
    checkpoints: int
    """Saved in the whole run."""
    kept: int
    """That are there at its end."""
    workers: int
    per_rank: int
    """Images of a batch on one rank, padding included."""
    micro_batch: int
    micro_batches: int
    padding: int
    """Rows of a batch, over all ranks, that are no images and have weight 0."""
    least_workers: int
    """Fewest that the run goes on with."""
    most_workers: int
    """Most that it takes; 0: as many as the cluster has."""


class Spread(NamedTuple):
    """The step of a run on another number of workers: batch, learning rate and result stay."""

    workers: int
    machines: int
    """Of 8 GPUs."""
    per_rank: int
    micro_batch: int
    micro_batches: int
    padding: int
    needed: int
    """Bytes of a GPU."""
    traffic: Traffic
    """Between machines, as the recipe reduces gradients."""
    lowered: Traffic
    """The same with gradients reduced in bf16."""
    whole: Traffic
    """The same under ZeRO 0, which needs more memory and sends no parameters."""


class Remedy(NamedTuple):
    """A change of settings, and the bytes that the run needs with it."""

    change: str
    needed: int


class DryRun(NamedTuple):
    """Everything that is known of a run before it starts."""

    config: RunConfig
    sizes: Census
    steps: Steps
    memory: Memory
    gpu: int
    """Bytes of a GPU; 0: not known."""
    remedies: list[Remedy]
    """Where it does not fit: changes of settings with which it does, the least first."""
    comparison: Deviations
    forecasts: list[Forecast]
    """The time of a step by kind of GPU, or on this CPU."""
    spreads: list[Spread]
    """On numbers of workers that the recipe allows, the expected one among them, and with a machine lost."""
    machines: int = 1
    """That the ranks are assumed to be on."""
    reading: Sequence[ReadingPlan] = ()
    """How each data set will be read; nothing where none is at hand."""

    @property
    def fits(self) -> bool | None:
        """None: the GPU is not known."""
        return self.memory.needed <= self.gpu if self.gpu else None


def dry_run(config: RunConfig, *, rows: int = 0, gpu: str = "", gpu_memory_gb: float = 0.0) -> DryRun:
    """Calculate all of it. `rows`: images of a data set that is not at hand; 0: as many as LUPerson has. `gpu`: kind of
    GPU; empty: this machine's.

    Training on a labelled data set that is not at hand is counted with the images and identities of Market-1501.
    Memory is that of a GPU unless the recipe asks for a CPU. Raises what starting the run would, but for want of data.
    """
    refuse_unsuited(config, torch.device("cpu" if config.engine.device == "cpu" else "cuda"))
    rows, known_from, data = _rows(config, rows)
    config = _sized(config, rows, data)
    sizes = memory.census(config)
    split = split_of(config, expected_workers(config))
    refuse_split(config, split, couples=sizes.couples)
    need = _needed(config, sizes)
    kinds = _kinds(config, gpu)
    room = round(gpu_memory_gb * GB) or (round(kinds[0].memory_gb * GB) if gpu else _present(config))
    remedies = _remedies(config, sizes, room) if room and need.needed > room else []
    steps = _steps(config, clock_of(config, rows), rows, known_from)
    spreads = [_spread(config, sizes, workers) for workers in _worlds(config)]
    machines = _machines(config)
    reading = data.reading(config.stream, machines if _shares_blocks(config) else 1) if data else []
    times = _forecasts(config, sizes, kinds)
    return DryRun(config, sizes, steps, need, room, remedies, compare(config), times, spreads, machines, reading)


def _kinds(config: RunConfig, gpu: str) -> list[Gpu]:
    """GPUs that time is calculated for: the one that is named, else this machine's, else two that are widely used; none
    for a run on CPUs. Raises ConfigError where the table has no such GPU."""
    if gpu:
        if (found := gpus.named(gpu)) is None:
            raise ConfigError(f"no datasheet of a GPU named {gpu} is known", where="--gpu",
                              hint=f"one of {', '.join(one.name for one in gpus.GPUS)}")  # fmt: skip
        return [found]
    if config.engine.device == "cpu":
        return []
    here = gpus.known(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    return [here] if here else [one for one in gpus.GPUS if one.name in COMMON]


def _forecasts(config: RunConfig, sizes: Census, kinds: list[Gpu]) -> list[Forecast]:
    workers, machines = expected_workers(config), _machines(config)
    if config.engine.device == "cpu":
        return [forecast_here(config, sizes, measured_machine(config, workers), Share(workers, 1, 1.0))]
    cores = config.stream.processes or config.stream.threads or max(CORES, config.cluster.cpus_per_worker)
    return [forecast(config, sizes, gpu, Share(workers, machines, cores)) for gpu in kinds]


def _machines(config: RunConfig) -> int:
    """Machines that the workers take up, of as many GPUs as most have."""
    return math.ceil(expected_workers(config) / (config.cluster.workers_per_node or MACHINE_GPUS))


def _shares_blocks(config: RunConfig) -> bool:
    """Are the blocks of the data shared among machines? Else each of them reads nearly all."""
    grouped = sampling_of(config) is not None or clustered(config) is not None
    return config.stream.assignment == "node" and not grouped


def _sized(config: RunConfig, rows: int, data: Data | None) -> RunConfig:
    """The recipe with what only its data tells: images, identities, samples of an epoch."""
    sampling = sampling_of(config)
    if sampling is None:
        return for_clusters(config, rows)
    if data is not None:
        return plan_run(config, data, expected_workers(config)).config
    method = config.method
    with contextlib.suppress(ConfigError):  # the recipe itself says how many identities there are
        method = methods.of(method).for_identities(method, max(1, round(sampling.fraction * MARKET_IDENTITIES)))
    epoch = config.samples_per_epoch or max(1, round(sampling.fraction * rows))
    return dataclasses.replace(config, method=method, samples_per_epoch=epoch)


def _rows(config: RunConfig, rows: int) -> tuple[int, str, Data | None]:
    """(images of the data set, where that is known from, the data set if it is at hand). One that is named but not at
    hand is no reason to fail."""
    absent = ""
    if config.stream.manifest or config.stream.mix:
        hasty = dataclasses.replace(config.storage, attempts=2, give_up_s=PATIENCE_S, timeout_s=PATIENCE_S)
        try:
            data = load_data(config.stream, hasty)
        except StorageError as error:
            absent = f", as {error.where or 'stream.manifest'} is not at hand: {error.what}"
        else:
            if rows:
                raise ConfigError("rows are given, and a data set that has its own", where="--rows, stream.manifest",
                                  hint="leave one of them out")  # fmt: skip
            return data.rows, " + ".join(config.stream.mix or (config.stream.manifest,)), data
    if rows:
        return rows, f"--rows{absent}", None
    labelled = clustered(config) or sampling_of(config)
    assumed, name = (MARKET, "Market-1501's training part") if labelled else (LUPERSON, "all of LUPerson")
    return assumed, f"assumed: {name}{absent}; another with --rows N or --stream.manifest SHARDS", None


def _steps(config: RunConfig, clock: Clock, rows: int, known_from: str) -> Steps:
    optimisation, saves, workers = config.optimisation, config.checkpoints, expected_workers(config)
    split = split_of(config, workers)
    kept = retention.kept_steps(saves, clock.total_steps, clock.epoch_steps)
    due = retention.due_steps(saves, clock.total_steps, clock.epoch_steps)
    ends = {end // clock.batch for end in milestone_ends(config.evaluation, clock)}
    saved = {*due.tolist(), *ends}
    return Steps(
        rows=rows,
        known_from=known_from,
        epoch_samples=clock.epoch_samples,
        per_epoch=clock.epoch_steps,
        total=clock.total_steps,
        warmup=optimisation.warmup_epochs * clock.epoch_steps,
        images=clock.end,
        checkpoints=len(saved),
        kept=len({*kept.tolist(), *sorted(saved)[-saves.keep_last :]}),
        workers=workers,
        per_rank=split.per_rank,
        micro_batch=split.micro_batch,
        micro_batches=split.micro_batches,
        padding=split.per_rank * workers - optimisation.batch,
        least_workers=config.cluster.least_workers,
        most_workers=config.cluster.max_workers,
    )


def _worlds(config: RunConfig) -> list[int]:
    """Numbers of workers from the recipe's least to its most: the expected one, that with a machine lost, and whole
    machines of 8 GPUs."""
    expected = expected_workers(config)
    wanted = {expected, expected - MACHINE_GPUS, *(MACHINE_GPUS * machines for machines in MACHINES)}
    least, most = config.cluster.least_workers, config.cluster.max_workers or max(expected, most_useful(config))
    return sorted(workers for workers in wanted if max(1, least) <= workers <= most)


def _spread(config: RunConfig, sizes: Census, workers: int) -> Spread:
    split, machines = split_of(config, workers), math.ceil(workers / MACHINE_GPUS)
    stage = config.engine.zero_stage if config.engine.stepper == "deepspeed" else None
    sent = [
        traffic(trained=sizes.trained, parameters=sizes.parameters, stage=stage_, reduction=reduction, ranks=workers,
                machines=machines, micro_batches=split.micro_batches)
        for stage_, reduction in ((stage, config.optimisation.reduction), (stage, "bf16"), (0, "bf16"))
    ]  # fmt: skip
    return Spread(workers, machines, split.per_rank, split.micro_batch, split.micro_batches,
                  split.per_rank * workers - config.optimisation.batch, _needed(config, sizes, workers).needed,
                  *sent)  # fmt: skip


def _needed(config: RunConfig, sizes: Census, workers: int = 0) -> Memory:
    """`workers` 0: as many as are expected."""
    ranks = workers or expected_workers(config)
    return memory.calculate(config, sizes, world=ranks, cuda=config.engine.device != "cpu")


def _present(config: RunConfig) -> int:
    """Memory of this machine's first GPU; 0 without one, or for a run on the CPU."""
    if config.engine.device == "cpu" or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(0).total_memory)


def _remedies(config: RunConfig, sizes: Census, gpu: int) -> list[Remedy]:
    """The largest micro-batch, the lowest ZeRO stage, checkpointed blocks, and both, as far as they are enough."""
    remedies = []
    for changed in (config, _checkpointed(config)):
        for smaller in _smaller(changed, sizes):
            needed = _needed(smaller, sizes).needed
            if needed <= gpu:
                remedies.append(Remedy(_change(config, smaller), needed))
                break
    for stage in (1, 2, 3):
        if config.engine.stepper == "deepspeed" and stage > config.engine.zero_stage:
            changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=stage))
            remedies.append(Remedy(_change(config, changed), _needed(changed, sizes).needed))
    return [remedy for remedy in remedies if remedy.needed <= gpu]


def _checkpointed(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, checkpoint_blocks=True))


def _smaller(config: RunConfig, sizes: Census) -> list[RunConfig]:
    """The run with ever smaller micro-batches, down to one image; only itself where a batch must stay whole."""
    split = split_of(config, expected_workers(config))
    halvings = 0 if sizes.couples else split.micro_batch.bit_length() - 1
    micros = [math.ceil(split.micro_batch / 2**halving) for halving in range(halvings + 1)]
    return [
        dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, micro_batch=micro))
        for micro in micros
    ]


def _change(before: RunConfig, after: RunConfig) -> str:
    """What to add to the command line."""
    flags = []
    if after.backbone.checkpoint_blocks != before.backbone.checkpoint_blocks:
        flags.append("--backbone.checkpoint-blocks True")
    micro = [split_of(one, expected_workers(one)).micro_batch for one in (before, after)]
    if micro[0] != micro[1]:
        flags.append(f"--optimisation.micro-batch {micro[1]}")
    if after.engine.zero_stage != before.engine.zero_stage:
        flags.append(f"--engine.zero-stage {after.engine.zero_stage}")
    return " ".join(flags)
