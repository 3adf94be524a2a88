"""A training step beside the published one on the same CPU thread, from the same weights, on the same views."""

import resource
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tests.bench.gpu.settings import settled
from tests.bench.gpu.trial import Noise, Trial
from tests.bench.measure import Spread, ratio
from tests.bench.published_inputs import inputs
from tests.bench.published_step import PublishedStep
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target
from tests.support.operations import HostReads, Operations, Products
from training.config.batch_split import split_of
from training.config.build import build_method, make_stepper
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.core.precision import Precision
from training.core.world import World, alone
from training.engine import ema
from training.engine.param_groups import settings_at
from training.methods.base import Method
from training.trainer.batch_to_device import BatchToDevice

RECIPES = ("pass_vits", "dino_vits", "personvit_vits", "personmae_vits")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
COMPARED = 4
"""Steps whose losses are compared."""
GOALS = {"fp32": (1.2, 0.85), "bf16": (1.15, 0.65)}
"""Of PASS at 16 images: times the transcription, share of the ceiling."""
AFTER_GOAL, LAUNCHES, READS, APART = 5.0, 60, 1, 1e-6
CPU = torch.device("cpu")


class Used(NamedTuple):
    """CPU seconds of this process so far."""

    user: float
    system: float

    @staticmethod
    def now() -> "Used":
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Used(used.ru_utime, used.ru_stime)

    def since(self, before: "Used") -> "Used":
        return Used(self.user - before.user, self.system - before.system)

    @property
    def whole(self) -> float:
        return self.user + self.system


class Taken(NamedTuple):
    """What one step took, all of it and the part after the backward pass."""

    all: Used
    after: Used


def step(scale: Scale) -> Table:
    """Every method in both precisions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    notes = [
        f"{scale.step_images} images a step at the published view sizes, one thread, plain stepper; goals are for PASS "
        "with 16 images (--full)",
        "transcription: one forward pass per resolution, dropped branches computed, loss pair by pair, clipping, AdamW "
        "and moving average parameter by parameter, everything under autocast; it is handed its normalised views and "
        "drop-path factors",
        "ceiling: the products and convolutions of our step by themselves, with operands of the same shapes",
        "operations and host reads after the backward pass: ZeRO-1, twelve narrow blocks, no views and allocations",
    ]
    try:
        for name in RECIPES:
            for precision in PRECISIONS:
                found, note = _compared(name, precision, scale)
                rows += found
                notes.append(note)
        with alone("cpu", group=True) as world:
            for name in RECIPES:
                rows += _counted(name, world)
    finally:
        torch.set_num_threads(threads)
    return Table("step", "one optimizer step, ours and as published", "see the row", tuple(rows), tuple(notes))


def configured(name: str, precision: Precision, images: int, *, tiny: bool = False) -> RunConfig:
    """A shipped recipe with so many images a step, all its parameters learning from the first step on."""
    config = settled(name, tiny=tiny)
    before, method = config.optimisation, config.method
    lr = before.lr * images / before.batch
    optimisation = replace(before, batch=images, micro_batch=images, lr=lr, warmup_epochs=0.0, precision=precision)
    if hasattr(method, "freeze_last_layer_epochs"):
        method = replace(method, freeze_last_layer_epochs=0)
    return replace(config, optimisation=optimisation, method=method)


# -- the contenders -------------------------------------------------------------------------------------------------


class Ours:
    """The loop that users run, over batches of noise."""

    def __init__(self, config: RunConfig, initial: Method) -> None:
        self.trial = Trial(config, initial, CPU, precision=config.optimisation.precision)
        self.trial.each_step = self._ended
        self._step = self.trial.run.stepper.step
        self.trial.run.stepper.step = self._timed  # type: ignore[method-assign]
        self._after = self._end = Used(0, 0)

    def _timed(self) -> Any:
        self._after = Used.now()
        return self._step()

    def _ended(self) -> None:
        self._end = Used.now()

    def step(self) -> Taken:
        """The next step."""
        before = Used.now()
        self.trial.until(self.trial.position // self.trial.batch + 1)
        return Taken(self._end.since(before), self._end.since(self._after))


class Theirs:
    """The transcription over the same batches, which are made ready before its time is taken."""

    def __init__(self, config: RunConfig, initial: Method) -> None:
        self.published = PublishedStep(config, initial)
        self.losses: list[float] = []
        self._inputs = inputs(config, CPU)

    def step(self) -> Taken:
        """The next step."""
        views, drawn, progress = next(self._inputs)
        before = Used.now()
        loss = self.published.forward(views, drawn, progress)
        loss.backward()
        after = Used.now()
        self.published.after(progress)
        self.losses.append(float(loss.detach()))
        end = Used.now()
        return Taken(end.since(before), end.since(after))


# -- figures --------------------------------------------------------------------------------------------------------


def _compared(name: str, precision: Precision, scale: Scale) -> tuple[list[Row], str]:
    config = configured(name, precision, scale.step_images, tiny=scale.step_tiny)
    initial = build_method(config)
    ours, theirs = Ours(config, initial), Theirs(config, initial)
    del initial
    took: dict[str, list[Taken]] = {"ours": [], "theirs": []}
    with Products() as products:
        ours.step()
    theirs.step()
    again = products.again()
    ceiling: list[float] = []
    for number in range(max(scale.rounds, COMPARED - 1)):
        turn = [("ours", ours), ("theirs", theirs)]
        for who, contender in turn if number % 2 else reversed(turn):
            took[who].append(contender.step())
        ceiling.append(sum(count * _alone(function, given) for function, given, count in again))
    apart = max(
        abs(one - other) / abs(other)
        for one, other in zip(ours.trial.losses[:COMPARED], theirs.losses[:COMPARED], strict=True)
    )
    return _rows(f"{name} {precision}", took, ceiling, apart, scale), _shares(f"{name} {precision}", took)


def _alone(function: Any, given: tuple[Any, ...]) -> float:
    """CPU seconds of one product."""
    function(*given)
    before = Used.now()
    function(*given)
    return Used.now().since(before).whole


def _rows(what: str, took: dict[str, list[Taken]], ceiling: list[float], apart: float, scale: Scale) -> list[Row]:
    def rates(seconds: list[float], work: int = 1) -> list[float]:
        return [work / max(one, 1e-9) for one in seconds]

    whole = {who: rates([one.all.whole for one in steps], scale.step_images) for who, steps in took.items()}
    after = {who: rates([one.after.whole for one in steps]) for who, steps in took.items()}
    alone_ = rates(ceiling, scale.step_images)
    judged = what.startswith("pass")
    speed, share = GOALS[what.split()[1]]
    exact = what.endswith("fp32")
    return [
        _row(f"{what}: images per CPU-second", whole["ours"], "transcription", whole["theirs"], speed if judged else 0),
        _row(f"{what}: images per CPU-second", whole["ours"], "ceiling", alone_, share if judged else 0),
        _row(f"{what}: clip, AdamW, moving average, 1/CPU-s", after["ours"], "transcription", after["theirs"],
             AFTER_GOAL if judged else 0),
        Row(f"{what}: largest relative difference of {COMPARED} losses", Spread.of([apart]),
            target=Target(APART, at_least=False) if exact else None),
    ]  # fmt: skip


def _row(what: str, ours: list[float], against: str, theirs: list[float], goal: float) -> Row:
    target = Target(goal) if goal else None
    return Row(what, Spread.of(ours), against, Spread.of(theirs), ratio(ours, theirs), target)


def _shares(what: str, took: dict[str, list[Taken]]) -> str:
    """User and system time apart."""
    texts = []
    for who, name in (("ours", "ours"), ("theirs", "transcription")):
        user, system = (Spread.of([getattr(one.all, part) for one in took[who]]).median for part in Used._fields)
        texts.append(f"{name} {user:.2f} + {system:.2f}")
    return f"{what}, CPU-s of a step, user + system: {', '.join(texts)}"


def _counted(name: str, world: World) -> list[Row]:
    """Operations and host reads after the backward pass."""
    found = after_backward(name, world)
    return [
        Row(f"{name}: operations after the backward pass", Spread.of([float(found.launched.total())]),
            target=Target(LAUNCHES, at_least=False)),
        Row(f"{name}: host reads after the backward pass", Spread.of([float(found.reads.total())]),
            target=Target(READS, at_least=False)),
    ]  # fmt: skip


class AfterBackward(NamedTuple):
    """What a step does after its backward pass: name -> how often."""

    launched: Counter[str]
    reads: Counter[str]


def after_backward(name: str, world: World) -> AfterBackward:
    """What a second step does after its backward pass under ZeRO-1; as many blocks as ViT-S, but narrow ones."""
    config = settled(name, tiny=True)
    method = config.method
    if hasattr(method, "freeze_last_layer_epochs"):
        method = replace(method, freeze_last_layer_epochs=0)
    images = 2  # every rank takes all of them, which changes no count
    config = replace(
        config, method=method, backbone=replace(config.backbone, depth=12),
        engine=replace(config.engine, stepper="deepspeed", zero_stage=1),
        optimisation=replace(config.optimisation, batch=images, micro_batch=images, precision="bf16", clip_norm=1e-6),
    )  # fmt: skip
    made = build_method(config)
    split, clock = split_of(config, world.size), clock_of(config, 0)
    stepper = make_stepper(config, made, world, split)
    place = BatchToDevice(CPU, config.views.statistics)
    for batch in Noise(config, CPU).after(0, 2 * images):
        progress = clock.at(batch.start)
        now = settings_at(config.optimisation, progress)
        stepper.apply(now, progress)
        stepper.backward(stepper.forward(place(batch), progress), last=True)
        with HostReads() as reads, Operations() as operations:
            result = stepper.step()
            made.after_step(result.sums, progress)
            networks = made.networks()
            if "teacher" in networks:
                ema.update(stepper.held(networks["student"]), stepper.held(networks["teacher"]), now.ema)
    return AfterBackward(operations.launched, reads.reads)
