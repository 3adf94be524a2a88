"""What a recipe must do on a GPU as it does on a CPU: checks, each with figures, bounds and a verdict."""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datapipe.storage import open_store
from tests.bench.gpu.settings import small
from tests.bench.gpu.trial import Trial
from training.config.build import build_method
from training.config.run_config import RunConfig
from training.core.precision import Precision, tf32_products
from training.methods.base import Method
from training.preflight.calculated.memory import FULL, Census

STEPS, SAVED_AFTER = 3, 2
"""Steps beside the CPU's, and those after which the checkpoint is saved that the last step is done again from."""
FIRST, LATER = 5e-6, 2e-5
"""How far the GPU's float32 loss may be from the CPU's, as a share of it: before anything is learnt, and after, when
rounding has moved the weights apart, too. The CPU's float32 and float64 are less than 1e-7 apart in all three."""
LOWERED = 0.01
"""How far the loss of a lowered precision may be from float32's. The CPU's bf16 is 1e-4 off."""
RESUMED_LOSS, RESUMED_WEIGHTS = 1e-6, 1e-5
"""How far the step after a resume may be from the same step without: of the loss, and of the norm of all parameters.
Not 0, as gradients that a GPU adds up in no fixed order differ in their last bits."""
GB = 1e9
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Check:
    """One check of one recipe."""

    passed: bool | None
    """None: it was left out."""
    why: str = ""
    """What failed, or why it was left out."""
    figures: dict[str, Any] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    """Figure that could not be had -> why."""


class Subject:
    """A recipe, ready to be tried."""

    def __init__(self, name: str, config: RunConfig, sizes: Census, *, tiny: bool = False) -> None:
        """`name`: of a shipped recipe, or of a file."""
        self.name, self.config, self.sizes, self.tiny = name, config, sizes, tiny

    @cached_property
    def initial(self) -> Method:
        """The method as a run starts with it, in host memory; never changed."""
        return build_method(self.config)


class Finished(NamedTuple):
    """What the steps on the GPU came to, and where they can be gone on from."""

    losses: list[float]
    state: dict[str, torch.Tensor]
    folder: Path | None
    """Of the checkpoint; None: there was no room for one."""


def beside_the_cpu(of: Subject, folder: Path) -> tuple[Check, Finished]:
    """The first float32 losses on both devices, from the same weights and batches. Leaves a checkpoint in `folder`."""
    config, fits = small(of.config), _fits(of.sizes, folder)
    here = Trial(config, of.initial, CPU, precision="fp32")
    here.until(STEPS)
    expected = here.losses
    del here
    with tf32_products(False):
        there = Trial(config, of.initial, GPU, precision="fp32", store=open_store(str(folder)))
        there.until(SAVED_AFTER, save=fits)
        there.until(STEPS)
    return _compared(there.losses, expected), Finished(there.losses, there.state(), folder if fits else None)


def _fits(sizes: Census, folder: Path) -> bool:
    """Is there room for a checkpoint, twice over?"""
    return 2 * FULL * (sizes.parameters + 2 * sizes.trained + sizes.buffers) < shutil.disk_usage(folder.parent).free


def resumed(of: Subject, finished: Finished) -> Check:
    """The last of these steps again, from the checkpoint, in a fresh method and stepper."""
    if finished.folder is None:
        return Check(None, "no room for a checkpoint; TMPDIR says where")
    again = Trial(small(of.config), of.initial, GPU, precision="fp32", store=open_store(str(finished.folder)))
    with tf32_products(False):
        again.resume()
        again.until(STEPS)
    mine, expected = again.state(), finished.state
    same = again.losses == finished.losses[-1:] and all(torch.equal(mine[name], expected[name]) for name in expected)
    off = apart(again.losses[0], finished.losses[-1])
    moved = _norm(mine[name].double() - value.double() for name, value in expected.items())
    weights_off = moved / _norm(value.double() for value in expected.values())
    passed = off <= RESUMED_LOSS and weights_off <= RESUMED_WEIGHTS
    figures = {
        "identical": same,
        "loss_off": off,
        "weights_off": weights_off,
        "bounds": [RESUMED_LOSS, RESUMED_WEIGHTS],
    }
    return Check(passed, "" if passed else f"loss {off:.1e}, weights {weights_off:.1e} off", figures)


def _compared(losses: list[float], expected: list[float]) -> Check:
    off = [apart(one, other) for one, other in zip(losses, expected, strict=True)]
    bounds = [FIRST] + [LATER] * (len(off) - 1)
    wrong = [step for step, (found, bound) in enumerate(zip(off, bounds, strict=True), 1) if not found <= bound]
    why = f"step {wrong[0]}: {off[wrong[0] - 1]:.1e} off" if wrong else ""
    return Check(not wrong, why, {"gpu": losses, "cpu": expected, "off": off, "bounds": bounds})


def lowered(of: Subject, precision: Precision, expected: float) -> Check:
    """One step under autocast. `expected`: the first loss in float32."""
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(None, "this GPU has no bf16")
    trial = Trial(small(of.config), of.initial, GPU, precision=precision)
    with tf32_products(True):
        trial.until(1)  # raises NotFinite
    off, scale = apart(trial.losses[0], expected), trial.run.stepper.scale
    figures = {"loss": trial.losses[0], "off": off, "bound": LOWERED, "scale": scale.value if scale else 1.0}
    return Check(off <= LOWERED, "" if off <= LOWERED else f"{off:.1e} off", figures)


def forget() -> None:
    """Give the GPU's memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def event() -> torch.cuda.Event:
    """One on the GPU's clock, recorded."""
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


def apart(one: float, other: float) -> float:
    """Their difference as a share of the other."""
    return abs(one - other) / abs(other)


def _norm(values: Iterator[torch.Tensor]) -> float:
    return sum(float((value * value).sum()) for value in values) ** 0.5
