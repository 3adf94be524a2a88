"""`python -m tests.bench.memory [RECIPE] [--stages 1 2 3]`: the peak memory of real steps of a published recipe, at its
full view sizes, beside the calculated one.

Two processes on the CPU, one image each, checkpointed blocks, small buckets. What is measured is a process's resident
memory at its highest in the second step (optimizer state exists by then) over that before the method was made; what is
calculated is `training.preflight.calculated.memory.Memory.peak`, without what a GPU adds.
"""

import argparse
import gc
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from tests.support.ranks import run_ranks
from training.config.batch_split import split_batch
from training.config.build import build_method, fake_batch, make_stepper, view_spec
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.core.world import World
from training.engine import ema, param_groups
from training.engine.deepspeed import warm_up
from training.preflight.calculated.memory import calculate, census
from training.recipes import SHIPPED
from training.trainer.batch_to_device import BatchToDevice

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
"""glibc gives back what is freed, instead of keeping it: else the peak is that of the allocator's habits."""
WORLD, BUCKET = 2, 1_000_000
GB = 1e9


class Measured(NamedTuple):
    """One rank's bytes over those before the method was made."""

    rest: int
    """Between two steps."""
    peak: int
    loss: float


def held(name: str) -> int:
    """A line of this process's status in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def recipe(name: str, stage: Any, precision: Any) -> RunConfig:
    """The published recipe with one image a rank."""
    config = load(SHIPPED / f"{name}.toml")
    return replace(
        config,
        backbone=replace(config.backbone, checkpoint_blocks=True),
        optimisation=replace(config.optimisation, batch=WORLD, micro_batch=1, precision=precision),
        engine=replace(config.engine, stepper="deepspeed", zero_stage=stage, bucket=BUCKET, device="cpu", threads=1),
        samples_per_epoch=1_000,
    )


def measure(world: World, config: RunConfig) -> Measured:
    """Two steps of one rank on noise, as the loop makes them."""
    prepare(world)
    before = held("VmRSS")
    split, clock = split_batch(WORLD, 1, world.size), clock_of(config, config.samples_per_epoch)
    method = build_method(config)
    stepper = make_stepper(config, method, world, split)
    for samples in (0, WORLD):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        progress = clock.at(samples)
        now = param_groups.settings_at(config.optimisation, progress)
        stepper.apply(now, progress)
        views = BatchToDevice(world.device, config.views.statistics)(fake_batch(view_spec(config), split, config))
        stepper.backward(stepper.forward(views, progress), last=True)
        result = stepper.step()
        method.after_step(result.sums, progress)
        ema.update(stepper.held(method.student), stepper.held(method.teacher), now.ema)
    return Measured(held("VmRSS") - before, held("VmHWM") - before, result.loss)


def prepare(world: World) -> None:
    """Import and make all that is there once, whatever the model."""
    torch.set_num_threads(1)
    warm_up(world)
    world.wait()
    gc.collect()


def main() -> None:
    """One line per stage; the processes of one end before those of the next begin."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="pass_vitb")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    chosen = parser.parse_args()
    os.environ.update(SETTINGS)  # for the processes that are started: this one's allocator has read its own already
    sizes = census(recipe(chosen.recipe, 1, chosen.precision))
    print(f"{chosen.recipe}, {chosen.precision}, {WORLD} processes, GB: measured (all ranks), calculated")
    for stage in chosen.stages:
        config = recipe(chosen.recipe, stage, chosen.precision)
        wanted = calculate(config, sizes, world=WORLD, cuda=False)
        free = psutil.virtual_memory().available
        if WORLD * wanted.peak > free:
            print(f"ZeRO {stage}: {WORLD} x {wanted.peak / GB:.2f} GB do not fit into {free / GB:.2f} GB", flush=True)
            continue
        found = run_ranks(WORLD, measure, config, fresh=True)
        peaks = " ".join(f"{one.peak / GB:.2f}" for one in found)
        off = max(one.peak for one in found) / wanted.peak - 1
        moments = " ".join(f"{name} {size / GB:.2f}" for name, size in wanted.moments.items())
        print(f"ZeRO {stage}: peak {peaks}, {wanted.peak / GB:.2f} ({100 * off:+.1f} %: {moments}); between steps "
              f"{' '.join(f'{one.rest / GB:.2f}' for one in found)}, {sum(wanted.state.values()) / GB:.2f}; "
              f"loss {found[0].loss:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
