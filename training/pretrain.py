"""One rank of a pre-training run, from the last good checkpoint to its end or a stop."""

import json
import os
import shlex
import socket
import time
from typing import NamedTuple

import torch

from datapipe.data import Data, load_data
from datapipe.loader import Batch
from training.assembly import (
    check,
    clock_of,
    fake_batch,
    initial_method,
    make_loader,
    make_stepper,
    portion,
    refuse_split,
    refuse_unsuited,
    view_spec,
)
from training.checkpoint import Checkpoints
from training.config import RunConfig
from training.engine.clock import Clock
from training.engine.faults import Faults, Rewind
from training.engine.host import Host
from training.engine.loop import Run, Segment, rehearse, train
from training.engine.optimizers import ParameterState
from training.engine.scaling import first_scale
from training.engine.stepper import Result, Stepper
from training.engine.stop import Stop
from training.engine.world import World
from training.initial_weights import in_words
from training.methods.base import Method, Progress
from training.metrics import Recorder
from training.placing import Place
from training.provenance import about, describe, resume_command
from training.run_folder import FLUSH_S, RunFolder

HEARTBEAT_S = 0.5
"""Seconds between signs of life on a local run folder; on object storage they come as seldom as other growing files."""


class Ending(NamedTuple):
    """How a call of `pretrain` ended."""

    step: int
    complete: bool
    """False: it was told to stop, saved, and goes on when started again."""


def pretrain(config: RunConfig, *, world: World, host: Host, reason: str = "started") -> Ending:
    """Run the recipe in this process as one rank of `world`, from the last good checkpoint to the end or a stop.

    Every rank calls this with the same `config`. Returns the same Ending on all ranks.
    """
    refuse_unsuited(config, world.device)
    _use_threads(config, world)
    data = check(config) if world.leads else load_data(config.stream, config.storage)
    folder = RunFolder(config.out, config.storage)
    clock = clock_of(config, data.rows)
    method, origin = initial_method(config)
    method = method.to(world.device)
    share = portion(config.optimisation.batch, config.optimisation.micro_batch, world.size)
    refuse_split(config, share, couples=method.couples_batch())
    if world.leads:
        describe(config, folder, data, world, share)
    say = host.say if world.leads else _silent
    stepper = make_stepper(config, method, world, share)
    checkpoints = Checkpoints(
        folder.at("checkpoints"), config.checkpoints, world, about=about(config, data, world, origin), say=say,
        replaces=data.replaces,
    )
    position, resumed = checkpoints.restore(stepper)
    with make_loader(config, data, world, share) as loader:
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
            run.recorder.say(_opening(config, data, clock, resumed, method))
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
    stepper.load_optimizer_state({name: ParameterState({}, 0.0) for name in stepper.names})
    stepper.scale = first_scale(config.optimisation.precision)


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


def _use_threads(config: RunConfig, world: World) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.engine.threads or max(1, cores // world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)


def _silent(line: str) -> None:
    """Ranks that do not lead say nothing."""


def _opening(config: RunConfig, data: Data, clock: Clock, resumed: str | None, method: Method) -> str:
    trained = sum(value.numel() for value in method.parameters() if value.requires_grad)
    start = f"goes on from {resumed}" if resumed else "starts"
    return (
        f"{config.method.name} {start}: {data.rows:,} crops, {clock.total_steps:,} steps of {clock.batch} images, "
        f"{trained / 1e6:.1f} M trained parameters, {config.optimisation.precision}, {config.engine.stepper}"
    )


def _closing(config: RunConfig, step: int, clock: Clock, done: bool) -> str:
    if done:
        return f"complete: {step:,} steps; {config.out}"
    return f"stopped after step {step:,} of {clock.total_steps:,}; go on with: {shlex.join(resume_command(config))}"
