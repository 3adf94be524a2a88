"""A method of a few thousand numbers, and its checkpoints."""

from typing import Any

import torch
from torch import Tensor

from datapipe.storage import Store
from training.checkpoint import Checkpoints, Reader, complete
from training.checkpoint.settings import CheckpointConfig
from training.core.run_folder.write_guard import FREE, GuardedStore, WriteGuard
from training.core.world import World
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig
from training.engine.stepper import Stepper
from training.methods.base import Method
from training.methods.pass_reid import Pass, PassConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig

ABOUT = {"manifest": "a" * 64, "manifest_rows": 100, "seed": 1, "batch": 4}


def make_method(seed: int = 0, *, width: int = 8) -> Method:
    torch.manual_seed(seed)
    backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=width, depth=1, heads=1)
    return Pass(PassConfig(local_size=(8, 8), head=HeadConfig(out_dim=8, hidden=8, bottleneck=4)), backbone)


def make_stepper(method: Method, **optimisation: Any) -> PlainStepper:
    return PlainStepper(method, group_parameters(method), OptimisationConfig(**optimisation), World())


def make_step(stepper: PlainStepper, seed: int = 0) -> None:
    """A step of the optimizer with made-up gradients."""
    torch.manual_seed(seed)
    for value in stepper.parameters.values():
        value.grad = torch.randn_like(value)
    for group in stepper.optimizer.param_groups:
        group["lr"] = 0.1
    stepper.optimizer.step()


def make_checkpoints(store: Store, *, world: World | None = None,
                     about: dict[str, Any] | None = None, guard: WriteGuard = FREE,
                     **config: Any) -> Checkpoints:  # fmt: skip
    settings = CheckpointConfig(**{"every_steps": 10, "keep_last": 2, "keep_every_steps": 20, **config})
    about = {**ABOUT, **(about or {})}
    return Checkpoints(GuardedStore(store, guard), settings, world or World(), about=about, guard=guard)


def save(checkpoints: Checkpoints, step: int, stepper: Stepper) -> None:
    """A checkpoint that exists when this returns."""
    checkpoints.save(step, 4 * step, stepper)
    checkpoints.finish()


def saved(store: Store, *steps: int) -> dict[int, Method]:
    """Checkpoints of different weights; which."""
    methods = {}
    checkpoints = make_checkpoints(store)
    for step in steps:
        methods[step] = make_method(seed=step)
        save(checkpoints, step, make_stepper(methods[step]))
    return methods


def tensors(store: Store, name: str = "") -> dict[str, Tensor]:
    """All that a checkpoint holds, put together; the newest."""
    reader = Reader(store, name or complete(store)[-1])
    return {key: reader.whole(key) for key in reader.marker.tensors}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal keys and bits."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
