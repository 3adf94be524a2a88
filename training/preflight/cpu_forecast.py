"""What a run on CPUs is in for, said before its first step: how long it takes, and whether memory can suffice.

Recipes are written for GPUs; on a machine without one they start all the same, and take months.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch import nn

from datapipe.core.errors import ConfigError
from datapipe.core.resource_limits import memory_left
from training.config.batch_split import split_of
from training.config.build import build_method, workload
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.clock import Clock
from training.preflight.calculated import activation_memory, memory
from training.preflight.calculated.activation_memory import FULL
from training.preflight.calculated.communication import GBIT_S
from training.preflight.calculated.computation import TRAFFIC
from training.preflight.calculated.gpus import Format
from training.preflight.calculated.machine import Machine
from training.preflight.calculated.operations import block_flops, computed_of_image

GB = 10**9
DAY_S = 86_400.0
LONG_S = DAY_S
"""A run on CPUs that takes longer is warned of."""
FAST = 5e9
"""Floating-point operations in a second that a rank on a CPU reaches at the very least: what is no long run at that is
not measured."""
TOKENS = 1_024
"""Tokens that go through the block that is measured."""
MEASURED_S = 0.4
LONG = 8_000_000
"""Numbers of a vector that no cache holds."""
BACKWARD = 3
"""Forward and backward pass over the forward pass."""


def warning(config: RunConfig, clock: Clock, world: World) -> str:
    """One line about a run on CPUs that takes longer than LONG_S; empty: it is short, or it has GPUs."""
    if world.device.type != "cpu":
        return ""
    work = computed_of_image(config) * clock.end / world.size
    if work / FAST < LONG_S:
        return ""
    rate = measured_rate(config)
    seconds = work / rate
    if seconds < LONG_S:
        return ""
    return (
        f"warning: no GPU: this run takes about {in_days(seconds)} on {world.size} CPU worker{'s'[: world.size > 1]} "
        f"(estimated: {clock.end:,} images, {computed_of_image(config) / 1e9:,.0f} GFLOP each, "
        f"{world.size * rate / 1e9:,.0f} GFLOP/s here); it is a recipe for GPUs"
    )


def refuse_want_of_memory(config: RunConfig, world: World, *, place: str) -> None:
    """Raises ConfigError, before anything is allocated, where the ranks of a machine cannot get the memory that is
    calculated for them. All ranks ask together; `place`: this rank's machine, in words."""
    if world.device.type == "cpu":
        need = needed(config, world.size)
        for where, workers, available in world.all_gather((place, world.local_size, available_memory())):
            _refuse(config, world.size, need, workers, available, where)


def refuse_on_this_machine(config: RunConfig, workers: int, device: torch.device) -> None:
    """Refuse a run whose workers, all on this machine, cannot have memory enough, before they are started."""
    if device.type == "cpu":
        _refuse(config, workers, needed(config, workers), workers, available_memory(), "this machine")


def _refuse(config: RunConfig, ranks: int, need: int, workers: int, available: int, where: str) -> None:
    if workers * need <= available:
        return
    each = f"{workers} workers need {need / GB:.1f} GB each" if workers > 1 else f"the run needs {need / GB:.1f} GB"
    split = split_of(config, ranks)
    fitting = _fitting(config, ranks, split.micro_batch, available // workers)
    smaller = f"--optimisation.micro-batch {fitting} would fit" if fitting else "no micro-batch is small enough"
    if ranks == workers and (fewer := _fewer(config, workers, available)):
        smaller += f"; so would --cluster.max-workers {fewer}"
    raise ConfigError(
        f"the memory of this machine cannot suffice: {each} (calculated, {split.micro_batch} images at once), "
        f"{available / GB:.1f} GB are available",
        where=f"optimisation.micro_batch = {config.optimisation.micro_batch}, on {where}",
        hint=f"{smaller}; `python -m training pretrain RECIPE --dry-run --engine.device cpu` says what takes how much",
    )


def _fewer(config: RunConfig, workers: int, available: int) -> int:
    """The most workers of one machine, by halves, that fit into so many bytes; 0: not even one."""
    while workers := workers // 2:
        if workers * needed(config, workers) <= available:
            return workers
    return 0


def _fitting(config: RunConfig, ranks: int, micro: int, available: int) -> int:
    """The largest micro-batch, by halves, that fits into so many bytes; 0: none does."""
    while micro := micro // 2:
        smaller = dataclasses.replace(config.optimisation, micro_batch=micro)
        if needed(dataclasses.replace(config, optimisation=smaller), ranks) <= available:
            return micro
    return 0


def needed(config: RunConfig, ranks: int) -> int:
    """Bytes that one of so many ranks on CPUs takes at the very least: no library, loader or cache is among them."""
    if workload(config, 1).complete:
        return memory.calculate(config, memory.census(config), world=ranks, cuda=False).peak
    split = split_of(config, ranks)
    kept = activation_memory.saved(config, split.micro_batch, activation_memory.numerics(config, cuda=False))
    weights = sum(value.numel() for value in _empty_method(config).parameters())
    return FULL * 2 * weights + sum(kept.values())  # weights and gradients; moments may be split over the ranks


def _empty_method(config: RunConfig) -> nn.Module:
    with torch.device("meta"):
        return build_method(config)


def measured_rate(config: RunConfig, seconds: float = MEASURED_S) -> float:
    """Floating-point operations that a step gets out of this process's threads in a second, by forward and backward
    passes through a block like those of the recipe's backbone: narrow ones reach a fraction of what wide ones do.

    What a step has beside blocks hardly changes it: `demo` on one core of a CPU with AMX took .96 (bf16) and 1.17
    (fp32) times as long as this says.
    """
    width, _, heads, mlp_ratio = config.backbone.shape
    stack = workload(config, 1).student[0]
    rows, bf16 = max(1, TOKENS // stack.tokens), config.optimisation.precision != "fp32"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        block = nn.TransformerEncoderLayer(width, heads, int(mlp_ratio * width), dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)  # fmt: skip
        inputs = torch.randn(rows, stack.tokens, width, requires_grad=True)

        def step() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                outputs = block(inputs)
            outputs.float().sum().backward()

        step()
        began, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds or not count:
            step()
            count += 1
    return BACKWARD * rows * block_flops(config.backbone, stack.tokens) * count / passed


def measured_machine(config: RunConfig, workers: int) -> Machine:
    """What one of so many workers on this machine reaches, in the recipe's precision and at the width of its backbone:
    products, those of attention, the traffic of norms, sums and GELUs in a forward and backward pass, and of a sum of
    long vectors."""
    width, _, heads, mlp_ratio = config.backbone.shape
    hidden, lowers = int(mlp_ratio * width), config.optimisation.precision != "fp32"
    own = torch.bfloat16 if lowers else torch.float32

    def product_rate(dtype: torch.dtype) -> float:
        inputs, weights = torch.ones(TOKENS, width, dtype=dtype), torch.ones(hidden, width, dtype=dtype)
        return 2.0 * TOKENS * width * hidden / _seconds(lambda: nn.functional.linear(inputs, weights))

    full, lowered = product_rate(torch.float32), product_rate(torch.bfloat16)
    queries = torch.ones(heads * TOKENS // 128, 128, width // heads, dtype=own)
    attended = 2.0 * 128 * queries.numel() / _seconds(lambda: queries @ queries.transpose(1, 2))
    norm, rows = nn.LayerNorm(width), torch.ones(TOKENS, width, requires_grad=True)
    wide = torch.ones(TOKENS, hidden, dtype=own, requires_grad=True)

    def rest() -> None:
        with torch.enable_grad():
            calm = norm(rows).to(own) + rows
            (norm(calm).to(own) + calm).sum().backward()
            nn.functional.gelu(wide).sum().backward()

    traffic = sum(TRAFFIC["lowered" if lowers else "fp32"]) * TOKENS * width
    long, other = torch.zeros(LONG), torch.zeros(LONG)
    stream = 3 * FULL * LONG / _seconds(lambda: long.add_(other)) / workers
    rates: dict[Format, float] = {"fp32": full, "tf32": full, "bf16": lowered, "fp16": lowered}
    return Machine(
        name="this CPU", products={form: rate / workers for form, rate in rates.items()},
        attention=min(1.0, attended / (lowered if lowers else full)), memory=traffic / _seconds(rest) / workers,
        stream=stream, launch_s=0.0, link=stream / 4, network=GBIT_S, host=math.inf, fused=False,
    )  # fmt: skip


def _seconds(work: Callable[[], object], least_s: float = 0.2) -> float:
    """How long one call takes, the middle of several."""
    work()
    took, began = list[float](), time.perf_counter()
    while time.perf_counter() - began < least_s or len(took) < 3:
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def in_days(seconds: float) -> str:
    """`36 hours`, `212 days`, `6 years`."""
    days = seconds / DAY_S
    if days < 3:
        return f"{seconds / 3600:.0f} hours"
    return f"{days:,.0f} days" if days < 1_000 else f"{days / 365:,.0f} years"


# ------------------------------------------------------------------------------------------------------- this machine


def available_memory() -> int:
    """Bytes that this process can still get: what the machine has free, or less where a container or a job limits
    it."""
    left = memory_left()
    free = int(psutil.virtual_memory().available)
    return free if left is None else min(free, left)
