"""Where a recipe becomes a run: the objects are made here, in the order of the data flow, and handed to the loop."""

import json
import math
import os
import platform
import shlex
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datapipe.errors import ConfigError, DataError
from datapipe.loader import Batch, Loader
from datapipe.manifest import Manifest
from datapipe.masking import draw_masks
from datapipe.order import ORDER_VERSION, Order
from datapipe.preview import TrainingViews, hide, view_sheet
from datapipe.randomness import words
from datapipe.stream import Stream
from datapipe.views import ViewSpec, make_views
from training import checkpoint, methods
from training import config as recipes
from training.checkpoint import Checkpoints
from training.config import RunConfig
from training.engine.clock import Clock
from training.engine.faults import Faults, Rewind
from training.engine.host import Host
from training.engine.loop import Run, Segment, rehearse, train
from training.engine.optimisation import group_parameters
from training.engine.plain import PlainStepper
from training.engine.stepper import AdamState, Result, Stepper
from training.engine.stop import Stop
from training.engine.world import World
from training.initial_weights import in_words, refuse_missing, start_from
from training.methods.base import Method, Progress
from training.metrics import Recorder
from training.placing import Place
from training.run_folder import FLUSH_S, RunFolder

FREE_TO_CHANGE = ("out", "storage", "engine", "checkpoints", "cluster", "optimisation.micro_batch",
                  "stream.threads", "stream.prefetch", "stream.cache_mb", "stream.max_bad")  # fmt: skip
"""Settings that may differ when a run is continued: they change where, how fast and how often, not what is learnt.
(stream.manifest is compared by its content, not by its address.)"""
HEARTBEAT_S = 0.5
"""Seconds between signs of life on a local run folder; on object storage they come as seldom as other growing files."""


class Ending(NamedTuple):
    """How a call of `pretrain` ended."""

    step: int
    complete: bool
    """False: it was told to stop, saved, and goes on when started again."""


class Portion(NamedTuple):
    """One rank's share of a global batch."""

    rows: int
    """Images per rank, padding included; a multiple of `micro`."""
    micro: int
    """Images taken through forward and backward at once."""


def portion(batch: int, micro_batch: int, world: int) -> Portion:
    """Equal shares for all ranks in equal micro-batches, with as little padding as that allows."""
    share = math.ceil(batch / world)
    pieces = math.ceil(share / micro_batch)
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
    return method, start_from(method, config.init, config.backbone, config.storage)


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


def training_views(config: RunConfig) -> TrainingViews:
    """The same with seed and order, for `python -m datapipe preview`."""
    return TrainingViews(view_spec(config), config.seed, config.stream.block, config.stream.window)


def check(config: RunConfig) -> Manifest:
    """Everything that can be refused before processes start: settings, data, an older run in the same folder.

    Raises ConfigError, DataError or StorageError.
    """
    if not config.stream.manifest:
        raise ConfigError(
            "no data set is given",
            where="stream.manifest",
            hint="--stream.manifest FOLDER, as printed by `python -m datapipe shard`",
        )
    manifest = Manifest.load(config.stream.manifest, config.storage)
    if manifest.rows == 0:
        raise DataError("the data set is empty", where=config.stream.manifest, hint="shard some crops first")
    clock_of(config, manifest.rows)
    if config.init.weights:
        refuse_missing(config.init, config.storage)
    folder = RunFolder(config.out, config.storage)
    _refuse_other_settings(config, folder)
    _refuse_other_data(folder, manifest)
    return manifest


def pretrain(config: RunConfig, *, world: World, host: Host, reason: str = "started") -> Ending:
    """Run the recipe in this process as one rank of `world`, from the last good checkpoint to the end or a stop.

    Every rank calls this with the same `config`. Returns the same Ending on all ranks.
    """
    _use_threads(config, world)
    manifest = check(config) if world.leads else Manifest.load(config.stream.manifest, config.storage)
    folder = RunFolder(config.out, config.storage)
    clock = clock_of(config, manifest.rows)
    method, origin = initial_method(config)
    method = method.to(world.device)
    share = portion(config.optimisation.batch, config.optimisation.micro_batch, world.size)
    if method.couples_batch() and share.rows > share.micro:
        raise ConfigError(
            f"{config.method.name} couples the images of a batch (Sinkhorn targets, batch norm in the stem), so a "
            f"batch cannot be taken in {share.rows // share.micro} micro-batches",
            where="optimisation.micro_batch, method.targets, backbone.stem",
            hint=f"optimisation.micro_batch = {share.rows}, more workers, or targets and a stem that do not couple",
        )
    if world.leads:
        _describe(config, folder, manifest, world, share)
    say = host.say if world.leads else _silent
    stepper = make_stepper(config, method, world, share)
    checkpoints = Checkpoints(
        folder.at("checkpoints"), config.checkpoints, world, about=_about(config, manifest, world, origin), say=say
    )
    position, resumed = checkpoints.restore(stepper)
    with _loader(config, manifest, world, share) as loader:
        run = Run(
            method=method, stepper=stepper, loader=loader, place=Place(world.device), clock=clock,
            optimisation=config.optimisation, micro_batch=share.micro, checkpoints=checkpoints,
            stop=Stop(host, world), host=host, faults=Faults(folder, world, say), watch=Watch(folder, world, config),
        )  # fmt: skip
        if position >= clock.end:
            say(f"complete: {clock.total_steps:,} steps were already done")
            return Ending(clock.total_steps, True)
        rehearse(run, fake_batch(view_spec(config), share, config))
        if world.leads:
            run.recorder = Recorder(folder, host, about={
                "world": world.size, "resumed_from": resumed, "step": position // clock.batch, "reason": reason,
            })  # fmt: skip
            run.recorder.say(_opening(config, manifest, clock, resumed, method))
            if origin and resumed is None:
                run.recorder.say(in_words(origin))
        position, done = _train(run, checkpoints, config, position)
    if run.recorder is not None:
        run.recorder.say(_closing(config, position // clock.batch, clock, done))
        run.recorder.close()
    return Ending(position // clock.batch, done)


def _train(run: Run, checkpoints: Checkpoints, config: RunConfig, position: int) -> tuple[int, bool]:
    """The loop, begun anew from the last checkpoint whenever a step asks for it."""
    while True:
        try:
            return train(run, Segment(run.clock.end), position=position)
        except Rewind:
            position, name = checkpoints.restore(run.stepper)
            if name is None:
                _begin_anew(run.stepper, config)


def _begin_anew(stepper: Stepper, config: RunConfig) -> None:
    """The state before the first step: initial weights, no moments."""
    initial = initial_method(config)[0].state_dict()
    stepper.load_model_state(initial, where="the initial weights")
    zeros = {name: torch.zeros_like(initial[name]) for name in stepper.names}
    stepper.load_optimizer_state({name: AdamState(zero, zero, 0.0) for name, zero in zeros.items()})


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


class Watch:
    """Signs of life of every rank: pid and step in ranks/rank_00.json, and the audit log if the recipe wants it."""

    def __init__(self, folder: RunFolder, world: World, config: RunConfig) -> None:
        self.folder, self.world, self.audit = folder, world, config.engine.audit
        self._every = HEARTBEAT_S if folder.local is not None else FLUSH_S
        self._beat(0)

    def __call__(self, progress: Progress, batch: Batch, result: Result) -> None:
        if self.audit:
            real = batch.weight > 0
            line = {"step": progress.step + 1, "samples": batch.sample[real].tolist(),
                    "positions": batch.position[real].tolist()}  # fmt: skip
            self.folder.append(f"ranks/audit_{self.world.rank:02d}.jsonl", json.dumps(line))
        if time.monotonic() - self._said > self._every:
            self._beat(progress.step + 1)

    def _beat(self, step: int) -> None:
        self._said = time.monotonic()
        life = {"pid": os.getpid(), "host": socket.gethostname(), "step": step, "time": time.time()}
        self.folder.write_json(f"ranks/rank_{self.world.rank:02d}.json", life)


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
        views=views, sample=rows, position=rows, weight=np.full(n, 1 / n), label=rows, camera=rows,
        start=0, after=n, waited_s=0.0,
        masks=draw_masks(spec.masks, config.seed, rows) if spec.masks else None,
        boxes=np.broadcast_to([0, 0, *config.backbone.size, 0], (spec.boxed, n, 5)).copy() if spec.boxed else None,
    )  # fmt: skip


def _loader(config: RunConfig, manifest: Manifest, world: World, share: Portion) -> Loader:
    order = Order(manifest.rows, config.seed, config.stream.block, config.stream.window)
    return Loader(
        Stream(manifest, config.storage, config.stream),
        order,
        view_spec(config),
        seed=config.seed,
        global_batch=config.optimisation.batch,
        rank=world.rank,
        world=world.size,
        micro_batch=share.micro,
        config=config.stream,
        allocate=_pinned if world.device.type == "cuda" else np.empty,
        ranks_here=world.local_size,
    )


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, which copies to the GPU beside the computation."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()


def _use_threads(config: RunConfig, world: World) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.engine.threads or max(1, cores // world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)


def _silent(line: str) -> None:
    """Ranks that do not lead say nothing."""


# -- an older run in the same folder ------------------------------------------------------------------------------


def saved_config(folder: RunFolder) -> RunConfig | None:
    """The resolved recipe of a run folder; None where there is none."""
    import tomllib

    text = folder.read_text("config.toml")
    return None if text is None else recipes.validate(tomllib.loads(text), where=folder.store.address("config.toml"))


def _refuse_other_settings(config: RunConfig, folder: RunFolder) -> None:
    if not checkpoint.complete(folder.at("checkpoints")):
        return
    before = saved_config(folder)
    if before is None:
        return
    changed = recipes.differences(before, config, ignore=(*FREE_TO_CHANGE, "stream.manifest"))
    if changed:
        raise ConfigError(
            "the run in this folder began with other settings:\n" + "\n".join(f"    {line}" for line in changed),
            where=folder.url,
            hint="set them back to go on with that run, or choose another folder with --out",
        )


def _refuse_other_data(folder: RunFolder, manifest: Manifest) -> None:
    store = folder.at("checkpoints")
    for name in reversed(checkpoint.complete(store)):
        try:
            marker = checkpoint.read_marker(store, name)
        except DataError:
            continue  # a damaged one is passed over, with a warning, when it is read
        checkpoint.refuse_other_data(marker, manifest.id, manifest.rows, where=store.address(name))
        return


# -- what the run folder says of the run -----------------------------------------------------------------------------


def _about(config: RunConfig, manifest: Manifest, world: World, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "manifest": manifest.id,
        "manifest_rows": manifest.rows,
        "seed": config.seed,
        "batch": config.optimisation.batch,
        "world": world.size,
        "config": recipes.to_tree(config),
        "versions": versions(),
        "origin": origin,
    }


def _describe(config: RunConfig, folder: RunFolder, manifest: Manifest, world: World, share: Portion) -> None:
    folder.write("command.txt", shlex.join(resume_command(config)) + "\n")
    folder.write("config.toml", recipes.to_toml(config))
    if config.engine.stepper == "deepspeed":
        folder.write_json("deepspeed.json", deepspeed_json(config, world, share))
    folder.write_json("environment.json", environment(manifest, world))
    folder.write("views.json", training_views(config).to_json() + "\n")
    folder.write("first_batch.jpg", view_sheet(first_views(config, manifest, count=8)))


def first_views(config: RunConfig, manifest: Manifest, *, count: int) -> dict[str, np.ndarray]:
    """The views of the first samples of the stream, uint8 [V, count, H, W, 3]: the pixels that training sees,
    patches that are hidden from the student in grey."""
    positions = np.arange(count, dtype=np.int64)
    order = Order(manifest.rows, config.seed, config.stream.block, config.stream.window)
    stream, spec = Stream(manifest, config.storage, config.stream), view_spec(config)
    out = {group.name: np.zeros(spec.shape(group, count), np.uint8) for group in spec.groups}
    make_views(stream.fetch(order.samples(positions)).data, spec, config.seed, positions, out)
    hide(out, spec, config.seed, positions)
    stream.close()
    return out


def versions() -> dict[str, str]:
    """Versions of what decides pixels and numbers."""
    names = ("torch", "timm", "deepspeed", "ray", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "pyarrow")
    found = {"python": platform.python_version(), "order": str(ORDER_VERSION)}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def environment(manifest: Manifest, world: World) -> dict[str, Any]:
    """Where, on what and from which data and code a run is made."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "versions": versions(),
        "git": _git(),
        "world": world.size,
        "device": device,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "manifest": {"id": manifest.id, "rows": manifest.rows, "shards": len(manifest.shards), "bytes": manifest.bytes,
                     "version": manifest.version, "url": manifest.url, "licence": manifest.licence},
    }  # fmt: skip


def _git() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def resume_command(config: RunConfig) -> list[str]:
    """The command that goes on with the run, from its own saved recipe."""
    module = os.environ.get("REID_ENTRY", "training")
    return ["python", "-m", module, "pretrain", f"{config.out.rstrip('/')}/config.toml"]


def _opening(config: RunConfig, manifest: Manifest, clock: Clock, resumed: str | None, method: Method) -> str:
    trained = sum(value.numel() for value in method.parameters() if value.requires_grad)
    start = f"goes on from {resumed}" if resumed else "starts"
    return (
        f"{config.method.name} {start}: {manifest.rows:,} crops, {clock.total_steps:,} steps of {clock.batch} images, "
        f"{trained / 1e6:.1f} M trained parameters, {config.optimisation.precision}, {config.engine.stepper}"
    )


def _closing(config: RunConfig, step: int, clock: Clock, done: bool) -> str:
    if done:
        return f"complete: {step:,} steps; {config.out}"
    return f"stopped after step {step:,} of {clock.total_steps:,}; go on with: {shlex.join(resume_command(config))}"
