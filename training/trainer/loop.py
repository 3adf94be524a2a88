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

    def ready(self) -> bool:
        """Can the next batch be had without waiting?"""
        ...


class EarlyCopies(Protocol):
    """Copies to a GPU that start before their micro-batch's turn: a `BatchToDevice`."""

    def ahead(self, batch: Batch) -> None:
        """Start the copy of the micro-batch that is placed next."""
        ...

    def settle(self) -> None:
        """Wait for copies: what they come from will be overwritten."""
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
    copies: EarlyCopies | None = None
    """Of `place`, where there is something to start early."""
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
    batches = _Batches(run, position, segment.end)
    for batch, parts in batches:
        run.host.stepping()
        progress = run.clock.at(batch.start)
        now = settings_at(run.optimisation, progress)
        run.stepper.apply(now, progress)
        result = _step(run, parts, progress, launched=batches.look_ahead)
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


class _Batches:
    """The batches of a segment, each with its micro-batches. To a GPU the first one is copied before the step before
    waits for the GPU, where the loader has it ready by then."""

    def __init__(self, run: TrainingRun, position: int, end: int) -> None:
        self._run = run
        self._source = run.loader.after(position, until=end)
        self._next: tuple[Batch, list[Batch]] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, list[Batch]]]:
        return self

    def __next__(self) -> tuple[Batch, list[Batch]]:
        batch, self._next = self._next or self._take(), None
        if batch is None:
            raise StopIteration
        return batch

    def look_ahead(self) -> None:
        """Start the copy of the next batch, if it can be had without waiting."""
        copies = self._run.copies
        if copies is None:
            return
        if self._next is None and self._run.loader.ready():
            self._next = self._take()
        if self._next is not None:
            copies.ahead(self._next[1][0])

    def _take(self) -> tuple[Batch, list[Batch]] | None:
        """The next batch of the loader, which then may fill the memory again that earlier ones were copied from."""
        if self._run.copies is not None:
            self._run.copies.settle()
        batch = next(self._source, None)
        return None if batch is None else (batch, list(batch.micro_batches(self._run.micro_batch)))


def _step(
    run: TrainingRun, parts: Sequence[Batch], progress: TrainingProgress, *, launched: Callable[[], None]
) -> Result:
    """The micro-batches of a batch through forward, backward and step; again, and exactly so, while gradients overflow
    at the loss scale: every random number hangs on the position alone. `launched` is called before each wait for the
    GPU."""
    before = run.stepper.scale
    while (result := _try(run, parts, progress, launched)).overflow:
        tried = int(result.metrics["scale"])
        run_lines.info(f"step {progress.step + 1:,}: gradients overflow at a loss scale of {tried:,}; halved")
    if not result.finite:
        run.stepper.scale = before  # what no scale mends says nothing about the scale
    return result


def _try(run: TrainingRun, parts: Sequence[Batch], progress: TrainingProgress, launched: Callable[[], None]) -> Result:
    with run.stepper.accumulation():
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            views = run.place(part)
            if run.copies is not None and following is not None:
                run.copies.ahead(following)
            run.stepper.backward(run.stepper.forward(views, progress), last=following is None)
    launched()
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
