"""The loop that every kind of training goes through."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from datapipe.stream.batch import Batch, LoaderCounters
from training.checkpoint import Checkpoints
from training.core.exchange import Exchange
from training.core.host import Host, run_lines
from training.engine import ema
from training.engine.clock import Clock
from training.engine.param_groups import StepSettings, settings_at
from training.engine.settings import OptimisationConfig
from training.engine.stepper import Result, Stepper
from training.methods.base import Method, TrainingProgress, Views
from training.trainer.agreement import Stop
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.monitoring.throughput import RankCounters
from training.trainer.nonfinite import Faults


class BatchSource(Protocol):
    """Where batches come from: a `datapipe.stream.loader.Loader`, or fixed batches in a test."""

    @property
    def intake(self) -> LoaderCounters:
        """Counters of the loader so far."""
        ...

    def after(self, position: int, until: int) -> Iterator[Batch]:
        """Global batches from a place in the stream, as this rank sees them."""
        ...


@dataclass(frozen=True)
class Segment:
    """A stretch of the run: until so many samples have been seen."""

    end: int


@dataclass
class TrainingRun:
    """Everything the loop needs, made by `pretrain.py` or a test."""

    method: Method
    stepper: Stepper
    loader: BatchSource
    place: Callable[[Batch], Views]
    """Moves one micro-batch to the device and normalises it."""
    clock: Clock
    optimisation: OptimisationConfig
    micro_batch: int
    checkpoints: Checkpoints | None
    host: Host
    faults: Faults
    exchange: Exchange
    """What ranks tell each other once a step; `stop`, `tally` and maybe observers take part."""
    observers: Sequence[Observer] = ()
    flush: Callable[[], None] = lambda: None
    """Writes what this rank still holds of its growing files. Called before each save: a checkpoint outlives the
    process, and so must what was recorded until then."""
    stop: Stop = field(init=False)
    tally: RankCounters = field(init=False)
    """What all ranks spent on waiting and reading."""

    def __post_init__(self) -> None:
        self.stop = Stop(self.host, self.exchange, self.checkpoints)
        self.tally = RankCounters(self.exchange)


def train(run: TrainingRun, segment: Segment, *, position: int = 0) -> tuple[int, bool]:
    """Steps from `position` until the segment is done or the run is told to stop.

    Returns (samples seen, segment complete). The state at the end is saved in both cases.
    """
    for batch in run.loader.after(position, until=segment.end):
        run.host.stepping()
        progress = run.clock.at(batch.start)
        now = settings_at(run.optimisation, progress)
        run.stepper.apply(now, progress)
        result = _step(run, batch, progress)
        run.exchange.receive()
        if result.finite:
            run.method.after_step(result.sums, progress)
            _follow(run, now.ema)
            _observe(run, progress, now, batch, result)
        else:
            run.faults.handle(progress, batch, result, run.stepper.names)  # raises Rewind, or the step is skipped
        position = batch.after
        run.exchange.send()
        if run.checkpoints is not None:
            ends = position >= segment.end
            _keep(run, run.checkpoints, progress.step + 1, position, stops=run.stop.reached, ends=ends)
        if run.stop.reached:
            break
    return position, position >= segment.end


def _step(run: TrainingRun, batch: Batch, progress: TrainingProgress) -> Result:
    """The batch through forward, backward and step; again, and exactly so, while gradients overflow at the loss scale:
    every random number hangs on the position alone."""
    before = run.stepper.scale
    while (result := _try(run, batch, progress)).overflow:
        tried = int(result.metrics["scale"])
        run_lines.info(f"step {progress.step + 1:,}: gradients overflow at a loss scale of {tried:,}; halved")
    if not result.finite:
        run.stepper.scale = before  # what no scale mends says nothing about the scale
    return result


def _try(run: TrainingRun, batch: Batch, progress: TrainingProgress) -> Result:
    parts = list(batch.micro_batches(run.micro_batch))
    for index, part in enumerate(parts):
        outcome = run.stepper.forward(run.place(part), progress)
        run.stepper.backward(outcome, last=index == len(parts) - 1)
    return run.stepper.step()


def rehearse(run: TrainingRun, batch: Batch) -> None:
    """Forward and backward on one micro-batch without a step: faults show in the first minute. Leaves no trace."""
    progress = run.clock.at(0)
    run.stepper.apply(settings_at(run.optimisation, progress), progress)
    run.stepper.rehearse(run.place(next(batch.micro_batches(run.micro_batch))), progress)


def _follow(run: TrainingRun, momentum: float) -> None:
    """The teacher moves towards the student."""
    networks = run.method.networks()
    if "teacher" in networks:
        ema.update(run.stepper.held(networks["student"]), run.stepper.held(networks["teacher"]), momentum)


def _observe(run: TrainingRun, progress: TrainingProgress, now: StepSettings, batch: Batch, result: Result) -> None:
    run.tally.note(batch.waited_s, run.loader.intake)
    step = StepDone(progress, now, batch, result, run.tally.latest)
    for observer in run.observers:
        observer.step(step)


def _keep(run: TrainingRun, checkpoints: Checkpoints, step: int, samples: int, *, stops: bool, ends: bool) -> None:
    """Begin a checkpoint where one is due, tell of those that exist by now. At a stop and at the end it is waited for;
    an end without its checkpoint is an error."""
    if checkpoints.due(step) or stops or ends:
        checkpoints.save(step, samples, run.stepper, first=run.flush)
        if stops or ends:
            checkpoints.finish(needed=ends, hurry=stops)
        for observer in run.observers:
            observer.paused()
    for saved in checkpoints.newly_saved():
        run.host.saved(saved.step)
        for observer in run.observers:
            observer.saved(saved)
