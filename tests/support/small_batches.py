"""A tiny method and fixed batches of noise, to carry out the same steps by other worlds, micro-batches and engines."""

from typing import Any

import numpy as np
import torch

from tests.support.trajectory import Trajectory, run_trajectory
from training.core.world import World
from training.methods import build
from training.methods.base import Method
from training.methods.dino import DinoConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig

BATCH, STEPS = 8, 2
SETTING: dict[str, Any] = {
    "epochs": 1, "batch": BATCH, "iterations_per_epoch": STEPS, "lr": {"base": 0.1, "final": 0.1, "warmup_epochs": 0},
    "weight_decay": (0.04, 0.04), "teacher_momentum": (0.9, 1.0), "clip_grad_per_tensor": 0.3,
}  # fmt: skip


def method() -> Method:
    """DINO with 2 global and 2 local views; the same weights every time. Its prototypes learn from the first step."""
    torch.manual_seed(3)
    backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=12, depth=2, heads=2, drop_path=0.2)
    head = HeadConfig(out_dim=16, hidden=12, bottleneck=8)
    return build(DinoConfig(locals=2, local_size=(8, 8), head=head, freeze_last_layer_epochs=0), backbone)


def batches() -> list[dict[str, np.ndarray]]:
    """The views of each step's images."""
    random = np.random.default_rng(5)
    shapes = {"global": (2, BATCH, 3, 16, 8), "local": (2, BATCH, 3, 8, 8)}
    return [{name: random.standard_normal(shape) for name, shape in shapes.items()} for _ in range(STEPS)]


def steps(world: World, micro_batch: int, dtype: torch.dtype, zero_stage: int | None, **changes: Any) -> Trajectory:
    """All of them on this rank; `zero_stage` None: the plain stepper. `changes`: other settings of the optimisation."""
    return run_trajectory(world, method, SETTING, batches(), dtype=dtype, zero_stage=zero_stage,
                          micro_batch=micro_batch, **changes)  # fmt: skip
