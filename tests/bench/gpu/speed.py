"""Rate, time by part, launches, waits and memory of a recipe's micro-batch, in its own precision, in one process."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo.utils

from datapipe.core.errors import ConfigError
from tests.bench.gpu.checks import GB, GPU, LOWERED, Check, Subject, apart, event
from tests.bench.gpu.counts import OperationsByPart, kernels, waits
from tests.bench.gpu.datasheet import GPUS, SIDE, beside_datasheet, product_rate
from tests.bench.gpu.parts import ABSENT, PARTS, Timeline, watched
from tests.bench.gpu.settings import full
from tests.bench.gpu.trial import Trial
from tests.bench.published_inputs import inputs
from tests.bench.published_step import METHODS, PublishedStep
from tests.support.operations import Operations
from training.config.build import allows_tf32, build_method
from training.config.run_config import RunConfig
from training.core.precision import tf32_products
from training.preflight.calculated.computation import pixels
from training.preflight.calculated.memory import calculate
from training.preflight.calculated.operations import backbone_format
from training.preflight.calculated.step_time import VIEW_RATE
from training.preflight.compiler import refuse_without_compiler

ABOVE, BELOW = 0.15, 0.15
"""How far the measured peak may be above or below the calculated one, as shares of it. The allocator alone, without
kernels, is within 0.05 for every recipe."""
WORKSPACES = 128 << 20
"""Bytes beyond that, of kernels; what is calculated is tensors, and what cuBLAS is given for a product."""
WARM_UP, TIMED, BY_PART, COUNTED = 3, 8, 4, 2
"""Steps before anything is measured; those for rate and memory; for times by part; for waits."""
TINY_SIDE = 256
BESIDE = "compiled code does not come through the dispatcher"
NO_WAIT = "batches are noise, made before they are asked for: nothing waits for a loader. --crops FOLDER measures it"


def speed(of: Subject, *, compiled: bool = False) -> Check:
    """A micro-batch a step. `compiled`: with torch.compile for blocks, whose memory is bounded from above alone."""
    config = full(of.name, of.config, of.sizes, torch.cuda.get_device_properties(GPU).total_memory)
    if compiled:
        try:
            refuse_without_compiler(GPU)
        except ConfigError as error:
            return Check(None, str(error).splitlines()[0])
    config = replace(config, backbone=replace(config.backbone, compile_blocks=compiled))
    initial, graphs = build_method(config) if compiled else of.initial, _graphs()
    trial = Trial(config, initial, GPU, precision=config.optimisation.precision)
    with tf32_products(allows_tf32(config)):
        figures, lacks = _timed(of, config, trial)
        figures |= {"parts_ms": _by_part(trial), "compiled_graphs": _graphs() - graphs}
        lacks |= {f"parts_ms: {part}": why for part, why in ABSENT.items()}
        if compiled and not figures["compiled_graphs"]:
            return Check(False, "nothing was compiled")
        more, why = ({"operations": None}, {"operations": BESIDE}) if compiled else _operations(trial)
        figures, lacks = figures | more, lacks | why
        more, why = _waits_and_kernels(trial)
        figures, lacks = figures | more, lacks | why
    need = calculate(config, of.sizes, world=1, cuda=True)
    bounds = [0.0 if compiled else (1 - BELOW) * need.peak, (1 + ABOVE) * need.peak + WORKSPACES]
    figures |= {"calculated": need.peak, "needed": need.needed, "moments": need.moments, "bounds": bounds}
    passed = bounds[0] <= figures["peak"] <= bounds[1]
    told = f"peak of {figures['peak'] / GB:.2f} GB, calculated {need.peak / GB:.2f}"
    return Check(passed, "" if passed else told, figures, lacks)


def _timed(of: Subject, config: RunConfig, trial: Trial) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures, and for each that is not there why."""
    trial.until(WARM_UP)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [event()]
    trial.each_step = lambda: events.append(event())
    trial.until(WARM_UP + TIMED)
    torch.cuda.synchronize()
    each = [one.elapsed_time(other) for one, other in zip(events, events[1:], strict=False)]
    milliseconds, images = statistics.median(each), config.optimisation.batch
    rate = 1_000 * images / milliseconds if milliseconds else 0.0
    published = of.config.optimisation.micro_batch or images
    figures: dict[str, Any] = {
        "precision": config.optimisation.precision, "images": images, "share_of_recipe": images / published,
        "ms": milliseconds, "slowest_ms": max(each), "images_per_s": rate,
        "data_wait": None,
        "loader_cores": rate * pixels(config, 1) / VIEW_RATE[config.views.interpolation],
        "peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip
    name = torch.cuda.get_device_name(GPU)
    figures |= beside_datasheet(config, of.sizes, rate, name)
    measured = product_rate(backbone_format(config), GPU, TINY_SIDE if of.tiny else SIDE)
    figures["product_tflops"] = measured / 1e12
    figures["share_of_product"] = figures["tflops"] * 1e12 / measured
    unknown = f"no datasheet of {name} is known, or none for {backbone_format(config)}"
    lacks = {key: unknown for key in ("mfu", "calculated_ms", f"reduce_ms_of_{GPUS}") if figures[key] is None}
    return figures, lacks | {"data_wait": NO_WAIT}


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _by_part(trial: Trial) -> dict[str, float | None]:
    trial.each_step = lambda: None
    timeline = Timeline(event)
    with watched(trial, timeline):
        trial.until(_done(trial) + BY_PART)
    torch.cuda.synchronize()
    return timeline.milliseconds()


def _operations(trial: Trial) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a step, by part, and why some have none."""
    with Operations() as operations:
        by_part = OperationsByPart(operations)
        with watched(trial, by_part):
            trial.until(_done(trial) + 1)
    named = {("heads, loss" if part == "forward" else part): count for part, count in by_part.of.items()}
    counts = {part: None if part in ABSENT else named.get(part, 0) for part in PARTS}
    return {"operations": counts}, {f"operations: {part}": why for part, why in ABSENT.items()}


def _waits_and_kernels(trial: Trial) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a step, and why figures of its kernels are not there."""
    steps = _done(trial) + COUNTED
    with waits() as found:
        trial.until(steps)
    ran, why = kernels(lambda: trial.until(steps + 1))
    lines = {line: count / COUNTED for line, count in found.most_common()}
    figures: dict[str, Any] = {name: ran.get(name) for name in ("kernels", "busy_ms")}
    return {"waits": lines, **figures}, {name: why for name, value in figures.items() if value is None}


def _done(trial: Trial) -> int:
    return trial.position // trial.batch


def beside_transcription(of: Subject) -> Check:
    """Our step and the published one in turn, from the same weights, on the same batches, in the same precision; the
    other one's views are ready when its time begins."""
    config = full(of.name, of.config, of.sizes, torch.cuda.get_device_properties(GPU).total_memory)
    if reason := untranscribed(config):
        return Check(None, reason)
    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses: list[float] = []
    try:
        ours = Trial(config, of.initial, GPU, precision=config.optimisation.precision)
        theirs, given = PublishedStep(config, copy.deepcopy(of.initial).to(GPU)), inputs(config, GPU)
        with tf32_products(allows_tf32(config)):
            for step in range(1, WARM_UP + TIMED + 1):
                took["ours"].append(_once(lambda step=step: ours.until(step)))
                ready = next(given)
                took["theirs"].append(_once(lambda ready=ready: losses.append(theirs.step(*ready))))
    except torch.cuda.OutOfMemoryError:
        return Check(None, f"no room for both with {config.optimisation.batch} images")
    off = apart(ours.losses[0], losses[0])
    found = {f"{who}_ms": statistics.median(times[WARM_UP:]) for who, times in took.items()}
    ratio = found["theirs_ms"] / found["ours_ms"] if found["ours_ms"] else None
    figures = {**found, "ratio": ratio, "loss_off": off, "bound": LOWERED, "images": config.optimisation.batch}
    return Check(off <= LOWERED, "" if off <= LOWERED else f"losses {off:.1e} apart", figures)


def untranscribed(config: RunConfig) -> str:
    """Why there is no transcription of what the recipe does; empty: there is."""
    if config.method.name not in METHODS:
        return f"the published step of {config.method.name} is not transcribed"
    if config.backbone.stem != "patch" or getattr(config.method, "targets", "centring") != "centring":
        return "neither a convolutional stem nor Sinkhorn's targets are transcribed"
    return ""


def _once(step: Callable[[], None]) -> float:
    """Milliseconds between an event before and one after."""
    begin = event()
    step()
    end = event()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
