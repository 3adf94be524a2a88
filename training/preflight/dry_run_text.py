"""A dry run for people to read, and for programs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from datapipe.core.progress import counted, duration
from training.config import recipe_toml as recipes
from training.config.build import workload
from training.engine.settings import OptimisationConfig
from training.preflight.calculated.communication import GBIT_S, Traffic
from training.preflight.calculated.memory import FRAGMENTATION, RESERVED, Census, Memory
from training.preflight.calculated.operations import computed_of_image, flops_of_image, of_image
from training.preflight.calculated.step_time import CORES, Forecast
from training.preflight.deviations import Deviations
from training.preflight.dry_run import GB, DryRun, Steps

RATE_IMAGES = 256
"""Images for which published scaling rules state the learning rate."""
GPU_FLOPS = 1e14
"""Floating-point operations in a second that a GPU is assumed to reach: about a third of an A100's peak in bf16."""
ADVICE = {
    "memory traffic": "--backbone.compile-blocks True, where blocks are not compiled yet",
    "launches": "a larger optimisation.micro_batch, --backbone.compile-blocks True",
    "communication and copies": "fewer ranks with more images each, --optimisation.reduction bf16, a lower ZeRO stage",
    "data": 'more cores for each GPU (stream.threads, or stream.processes), views.interpolation = "linear"',
}
"""What takes most of a step -> what helps; matrix products are what a step is for."""
MOST = 6
"""Differences from what is published that the answer names."""
NOT_COUNTED = "heads, loss and teacher, of which this method says nothing (Method.workload): memory is known from below"


def to_tree(run: DryRun) -> dict[str, Any]:
    """All of it as nested plain values; memory in bytes."""
    compared = run.comparison
    return {
        "recipe": recipes.to_tree(run.config),
        "parameters": {
            "student": run.sizes.student,
            "teacher": run.sizes.teacher,
            "trained": run.sizes.trained,
            "frozen": run.sizes.parameters - run.sizes.trained,
        },
        "steps": run.steps._asdict(),
        "learning_rate": run.config.optimisation.lr,
        "spreads": [
            {name: value._asdict() if isinstance(value, Traffic) else value for name, value in spread._asdict().items()}
            for spread in run.spreads
        ],
        "operations": of_image(run.config)._asdict() | {"total": flops_of_image(run.config)},
        "time": [_timed(run, one) for one in run.forecasts],
        "memory": {
            **run.memory._asdict(),
            "peak": run.memory.peak,
            "not_calculated": run.memory.not_calculated,
            "needed": run.memory.needed,
            "gpu": run.gpu or None,
            "fits": run.fits,
            "remedies": [remedy._asdict() for remedy in run.remedies],
            **({} if _is_complete(run) else {"not_counted": NOT_COUNTED}),
        },
        "reading": {
            "machines": run.machines,
            "data_sets": [{**asdict(plan), "advice": list(plan.advice())} for plan in run.reading],
        },
        "published": {
            "recipe": compared.recipe,
            "data": compared.data,
            "differences": [difference._asdict() for difference in compared.differences],
            "choices": [choice._asdict() for choice in compared.choices],
        },
    }


def page(run: DryRun, *, full: bool = False) -> str:
    """The answer: whether it fits, steps, what differs from the publication. `full`: all of it, with the resolved
    recipe."""
    machine = "process" if run.config.engine.device == "cpu" else "GPU"
    answer = [
        *_verdict(run),
        *_steps(run.steps, run.config.optimisation),
        *_time(run),
        *_reading(run),
        *_differences(run.comparison),
    ]
    sections: dict[str, Iterable[str]] = {f"{run.config.method.name}, {run.config.backbone.arch}": answer}
    if full:
        sections |= {
            f"Memory of one {machine}, calculated": _memory(run),
            "Time of a step, calculated": _by_part(run),
            "The same step on other workers": _spreads(run),
            "Parameters": _parameters(run.sizes),
            f"Beside what is published ({run.comparison.recipe or 'nothing is'})": _compared(run.comparison),
            "Recipe, resolved": recipes.to_toml(run.config).splitlines(),
        }
    text = "\n\n".join("\n".join([f"== {title} ==", *lines]) for title, lines in sections.items())
    return text if full else f"{text}\n--full adds memory in parts, parameters, sources, and the resolved recipe"


def _differences(comparison: Deviations) -> Iterator[str]:
    """How far it is from what was published, in a line each."""
    if not comparison.recipe:
        yield "nothing is published of this method"
    elif not comparison.differences:
        chosen = f"{len(comparison.choices)} settings that are not published were chosen"
        yield f"as published ({comparison.recipe}); {chosen}"
    else:
        yield f"differs from what is published ({comparison.recipe}):"
        for difference in comparison.differences[:MOST]:
            yield f"  {difference.key} = {_value(difference.ours)}, published {_value(difference.published)}"
        if len(comparison.differences) > MOST:
            yield f"  and {len(comparison.differences) - MOST} more"


def _parameters(sizes: Census) -> Iterator[str]:
    parts = {f"student: {part}": number for part, number in sizes.student.items()}
    totals = {"student": sum(parts.values()), "teacher": sizes.teacher, "trained": sizes.trained,
              "frozen": sizes.parameters - sizes.trained}  # fmt: skip
    yield from _columns({name: f"{number:>13,}" for name, number in (parts | totals).items()})


def _steps(steps: Steps, optimisation: OptimisationConfig) -> Iterator[str]:
    split = (
        f"{counted(steps.per_rank, 'image')} on each of {counted(steps.workers, 'rank')}, {steps.micro_batch} at once"
        f"{f' ({steps.micro_batches} times)' if steps.micro_batches > 1 else ''}"
    )
    most = f"up to {steps.most_workers}" if steps.most_workers else "as many as the cluster has"
    counted_with = "" if steps.most_workers == steps.workers else f"; {steps.workers} are counted with here"
    rate = optimisation.lr * RATE_IMAGES / optimisation.batch
    yield from _columns({
        "images of the data set": f"{steps.rows:,} ({steps.known_from})",
        "steps of an epoch": f"{steps.per_epoch:,.1f}",
        "steps": f"{steps.total:,}, of them {steps.warmup:,.0f} of warm-up",
        "images seen": f"{steps.images:,}",
        "workers": f"{most}, at least {steps.least_workers}{counted_with}",
        "batch": f"{optimisation.batch}: {split}, {steps.padding} of them padding",
        "learning rate": f"{optimisation.lr:g} ({rate:g} for each {RATE_IMAGES} images), on any number of ranks",
        "checkpoints": f"{steps.checkpoints:,} saved, {steps.kept} kept at the end",
    })  # fmt: skip


def _spreads(run: DryRun) -> Iterator[str]:
    """What changes with the number of workers, a line each; seconds of a step at assumed rates."""
    flops = run.config.optimisation.batch * computed_of_image(run.config)
    yield "  workers  images each   at once  padding       GPU  computes  network  in bf16  ZeRO 0, bf16"
    for one in run.spreads:
        once = f"{one.micro_batch} x {one.micro_batches}"
        seconds = (one.traffic.seconds(), one.lowered.seconds(), one.whole.seconds())
        spent = f"{flops / one.workers / GPU_FLOPS:8.3f}" + "".join(f"  {value:7.3f}" for value in seconds)
        yield f"  {one.workers:>7}  {one.per_rank:>11}  {once:>8}  {one.padding:>7}  {_gb(one.needed):>8}  {spent}"
    largest, reduction = run.spreads[-1].traffic, run.config.optimisation.reduction
    yield (f"  seconds of a step: to compute at {GPU_FLOPS / 1e12:.0f} TFLOP/s a GPU, and then to send and receive on "
           f"{GBIT_S:.0f} Gb/s")  # fmt: skip
    yield (f"  between machines of 8 GPUs (here gradients of {_gb(largest.gradients)} in {reduction} and parameters of "
           f"{_gb(largest.parameters)}); in bf16: --optimisation.reduction bf16")  # fmt: skip


def _memory(run: DryRun) -> Iterator[str]:
    need: Memory = run.memory
    yield "throughout a step:"
    yield from _columns(_sizes(need.state))
    yield "kept of a micro-batch for the backward pass:"
    yield from _columns(_sizes(need.saved))
    if not _is_complete(run):
        yield f"not counted: {NOT_COUNTED}"
    yield "fullest points of a step:"
    yield from _columns(_sizes(need.moments))
    yield from _columns({
        "peak": _gb(need.peak),
        "not calculated": f"{_gb(need.not_calculated)}  (CUDA context, workspaces, fragmentation: "
        f"assumed {_gb(RESERVED)} and {FRAGMENTATION:.0%} of the peak)",
        "needed": _gb(need.needed),
    })  # fmt: skip


def _is_complete(run: DryRun) -> bool:
    return workload(run.config, run.steps.micro_batch).complete


def _time(run: DryRun) -> Iterator[str]:
    """How long the run takes, on each kind of GPU that was asked for."""
    for one in run.forecasts:
        took, least, most = (duration(run.steps.total * each) for each in (one.usual.seconds, one.least_s, one.most_s))
        kind = "GPU" if one.peak else "process"
        mfu = f", MFU {one.mfu:.0%}" if one.mfu is not None else ""
        where = f"{counted(run.steps.workers, kind)}, {one.machine}"
        yield f"  time: {took} ({least} to {most}) on {where}: {_hours(run, one):,.0f} {kind} hours"
        yield f"        {one.usual.images_per_s:,.0f} images/s{mfu}, limited by {one.limit}"
    if run.forecasts:
        yield "        calculated; --full has it by part, --gpu NAME another GPU"


def _hours(run: DryRun, one: Forecast) -> float:
    """GPU-hours, or hours of a process."""
    return run.steps.total * one.usual.seconds * run.steps.workers / 3600


def _by_part(run: DryRun) -> Iterator[str]:
    """A step by part, milliseconds, and what bounds each."""
    for one in run.forecasts:
        took, least, most = (f"{1e3 * each:,.1f}" for each in (one.usual.seconds, one.least_s, one.most_s))
        yield f"{one.machine}: {took} ms a step ({least} to {most})"
        for name, seconds in one.usual.seconds_of().items():
            part = one.usual.parts.get(name)
            bound = f"a batch takes the loader {1e3 * one.usual.data_s:,.1f} ms, beside the rest" if part is None else (
                f"products {1e3 * part.products:,.1f}, memory {1e3 * part.memory:,.1f}, launching beside "
                f"{1e3 * part.launch:,.1f}, links {1e3 * part.links:,.1f}")  # fmt: skip
            yield f"  {name:<12}{1e3 * seconds:>9,.1f}   {bound}"
        limits = ", ".join(f"{name} {seconds / one.usual.seconds:.0%}" for name, seconds in one.usual.limits().items())
        yield f"  limited by: {limits}"
        if advice := ADVICE.get(one.limit):
            yield f"  what helps: {advice}"
        yield f"  {one.error}"
    yield (f"  scores are not in it; {CORES} cores for each GPU are assumed where stream.threads and stream.processes "
           "say nothing")  # fmt: skip


def _timed(run: DryRun, one: Forecast) -> dict[str, Any]:
    """A forecast as plain values."""
    usual = one.usual
    return {
        "machine": one.machine, "step_s": usual.seconds, "least_s": one.least_s, "most_s": one.most_s,
        "run_s": run.steps.total * usual.seconds, "gpu_hours": _hours(run, one), "images_per_s": usual.images_per_s,
        "mfu": one.mfu, "limited_by": one.limit, "limits": usual.limits(), "parts": usual.seconds_of(),
        "of_parts": {name: part._asdict() for name, part in usual.parts.items()}, "data_s": usual.data_s,
        "error": one.error,
    }  # fmt: skip


def _reading(run: DryRun) -> Iterator[str]:
    """How the crops come from object storage; nothing where they lie on disks of the machines, or are not at hand."""
    for plan in run.reading:
        advice = list(plan.advice())
        if plan.keeps == "disk" and not advice:
            machines = counted(run.machines, "machine")
            yield f"  data: each of {machines} keeps a window, {_gb(plan.window)}, on disk and reads the next ahead"
        yield from (f"  data: {line}" for line in advice)


def _verdict(run: DryRun) -> Iterator[str]:
    need = f"needs {_gb(run.memory.needed)}" + ("" if _is_complete(run) else " and more: not all of it is counted")
    if run.fits is None:
        yield f"{need} (calculated); does it fit? --gpu-memory-gb N tells"
    elif run.fits:
        yield f"fits: {need} of {_gb(run.gpu)} (calculated)"
    else:
        ways = "; it would with one of:" if run.remedies else ""
        yield f"does NOT fit: {need}, has {_gb(run.gpu)} (calculated){ways}"
        for remedy in run.remedies:
            yield f"  {remedy.change}   ({_gb(remedy.needed)})"
        if not run.remedies:
            yield "  no micro-batch, checkpointing of blocks or ZeRO stage is enough: a larger GPU, or more workers"


def _compared(comparison: Deviations) -> Iterator[str]:
    if not comparison.recipe:
        yield "of this method no settings are"
        return
    if comparison.data:
        yield f"published on: {comparison.data}"
    if not comparison.differences:
        yield "no setting differs from a published one"
    for difference in comparison.differences:
        yield f"  {difference.key} = {_value(difference.ours)}, published {_value(difference.published)}"
        yield f"      {difference.source}"
    if comparison.choices:
        yield "not published, chosen:"
    for choice in comparison.choices:
        own = "" if choice.ours == choice.shipped else f" (the recipe: {_value(choice.shipped)})"
        yield f"  {choice.key} = {_value(choice.ours)}{own}" + (f"   {choice.reason}" if choice.reason else "")


def _columns(rows: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        yield f"  {name:<{width}}  {value}"


def _sizes(parts: Mapping[str, int]) -> dict[str, str]:
    return {name: _gb(size) for name, size in parts.items()}


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else "absent" if value is None else repr(value)
