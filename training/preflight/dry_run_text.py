"""A dry run for people to read, and for programs."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datapipe.core.progress import counted, duration
from training.config import recipe_toml as recipes
from training.config.build import workload
from training.engine.settings import OptimisationConfig
from training.preflight.communication import GBIT_S, Traffic
from training.preflight.deviations import Deviations
from training.preflight.dry_run import GB, DryRun, Steps
from training.preflight.memory import FRAGMENTATION, RESERVED, Census, Memory
from training.preflight.operations import computed_of_image

RATE_IMAGES = 256
"""Images for which published scaling rules state the learning rate."""
GPU_FLOPS = 1e14
"""Floating-point operations in a second that a GPU is assumed to reach: about a third of an A100's peak in bf16."""
MOST = 8
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
        *_differences(run.comparison),
    ]
    sections: dict[str, Iterable[str]] = {f"{run.config.method.name}, {run.config.backbone.arch}": answer}
    if full:
        sections |= {
            f"Memory of one {machine}, calculated": _memory(run),
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
    """How long GPUs take at a rate that they are assumed to reach."""
    if run.config.engine.device != "cpu":
        hours = run.steps.images * computed_of_image(run.config) / GPU_FLOPS / 3600
        took = duration(3600 * hours / run.steps.workers)
        yield (f"  time: about {took} on {counted(run.steps.workers, 'GPU')} at an assumed "
               f"{GPU_FLOPS / 1e12:.0f} TFLOP/s each ({hours:,.0f} GPU hours)")  # fmt: skip


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
