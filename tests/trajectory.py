"""Drives the Method, loop and steppers that users run over the fixed batches of a golden training trajectory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datapipe.loader import Batch
from tests.golden import golden, group
from training.backbone import BackboneConfig
from training.config import EngineConfig, OptimisationConfig
from training.engine.clock import Clock
from training.engine.host import LocalHost
from training.engine.loop import Run, Segment, rehearse, train
from training.engine.optimisation import group_parameters
from training.engine.plain import PlainStepper
from training.engine.stepper import Result, Stepper
from training.engine.stop import Stop
from training.engine.world import World
from training.heads import HeadConfig
from training.methods import build
from training.methods.base import Method, Progress, Views
from training.methods.pass_reid import PassConfig
from training.pretrain import Portion, portion
from training.weights import load_counted


@dataclass
class Trajectory:
    """What a run over the golden batches gave, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class FixedBatches:
    """The golden batches in order, epoch after epoch; this rank's rows of each, padded like the loader's."""

    bad = 0

    def __init__(self, batches: list[dict[str, np.ndarray]], size: int, share: Portion, rank: int) -> None:
        self.batches, self.size, self.share, self.rank = batches, size, share, rank

    def after(self, position: int, until: int) -> Iterator[Batch]:
        for start in range(position, until, self.size):
            yield self._rows(self.batches[start // self.size % len(self.batches)], start)

    def _rows(self, views: dict[str, np.ndarray], start: int) -> Batch:
        low = self.rank * self.share.rows
        rows = np.arange(low, low + self.share.rows)
        real = rows < self.size
        position = np.where(real, start + rows, -1)
        held = {name: self._padded(array, rows, real) for name, array in views.items()}
        weight = np.where(real, 1 / self.size, 0.0)
        return Batch(held, position, position, weight, position, position, start, start + self.size)

    @staticmethod
    def _padded(array: np.ndarray, rows: np.ndarray, real: np.ndarray) -> np.ndarray:
        taken = array[:, np.minimum(rows, array.shape[1] - 1)].copy()
        taken[:, ~real] = 0
        return taken


def pass_trajectory(
    item: str, *, native_resize: bool
) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[], Method]]:
    """(description, tensors, maker of the method in its initial state) of `train_pass`."""
    about, tensors = golden(item)
    setting = about["hyper_parameters"]
    backbone = BackboneConfig(
        arch="custom", size=tuple(setting["img_size"]), patch=setting["patch_size"], width=setting["embed_dim"],
        depth=setting["depth"], heads=setting["num_heads"], mlp_ratio=setting["mlp_ratio"],
        resize_positions_at_native_size=native_resize,
    )  # fmt: skip
    loss, head = setting["loss"], setting["head"]
    parts = sum(name.startswith("backbone.part_token") for name in setting["trainable_parameters"])
    config = PassConfig(
        parts=parts, locals_per_part=setting["local_views"] // parts, local_size=tuple(setting["local_size"]),
        head=HeadConfig(out_dim=head["out_dim"], hidden=head["hidden_dim"], bottleneck=head["bottleneck_dim"],
                        layers=head["nlayers"], norm_last_layer=head["norm_last_layer"]),
        student_temp=loss["student_temp"], warmup_teacher_temp=loss["warmup_teacher_temp"],
        teacher_temp=loss["teacher_temp"], teacher_temp_warmup_epochs=loss["warmup_teacher_temp_epochs"],
        centre_momentum=loss["center_momentum"], freeze_last_layer_epochs=setting["freeze_last_layer_epochs"],
    )  # fmt: skip

    def make() -> Method:
        method = build(config, backbone)
        initial = group(tensors, "init/")
        for network in (method.student, method.teacher):
            load_counted(network, initial)
        return method

    return about, tensors, make


def optimisation_of(setting: dict[str, Any]) -> OptimisationConfig:
    """The optimisation settings of a golden trajectory."""
    return OptimisationConfig(
        epochs=setting["epochs"], batch=setting["batch"], micro_batch=setting["batch"], precision="fp32",
        lr=setting["lr"]["base"], final_lr=setting["lr"]["final"], warmup_epochs=setting["lr"]["warmup_epochs"],
        weight_decay=setting["weight_decay"][0], final_weight_decay=setting["weight_decay"][1],
        ema=setting["teacher_momentum"][0], final_ema=setting["teacher_momentum"][1],
        clip="tensor", clip_norm=setting["clip_grad_per_tensor"],
    )  # fmt: skip


def batches_of(setting: dict[str, Any], tensors: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """The golden batches as the method's named views, [V, B, 3, H, W]."""
    found = []
    for number in range(setting["iterations_per_epoch"]):
        views = [value for _, value in sorted(group(tensors, f"batch{number}/view").items())]
        split = setting["global_views"]
        found.append({"global": torch.stack(views[:split]).numpy(), "local": torch.stack(views[split:]).numpy()})
    return found


def run_trajectory(
    world: World,
    make: Callable[[], Method],
    setting: dict[str, Any],
    batches: list[dict[str, np.ndarray]],
    *,
    dtype: torch.dtype,
    zero_stage: int | None = None,
    micro_batch: int | None = None,
    rehearsal: bool = False,
) -> Trajectory:
    """The whole trajectory through `training.engine.loop.train`; `zero_stage` None: the plain stepper."""
    config = optimisation_of(setting)
    method = make().to(dtype)
    share = portion(config.batch, micro_batch or config.batch, world.size)
    clock = Clock(config.batch, config.batch * setting["iterations_per_epoch"], config.epochs, seed=0)
    found = Trajectory()

    def place(batch: Batch) -> Views:
        views = {name: torch.from_numpy(array).to(dtype) for name, array in batch.views.items()}
        return {**views, "position": torch.from_numpy(batch.position), "sample": torch.from_numpy(batch.sample),
                "weight": torch.from_numpy(batch.weight).to(dtype)}  # type: ignore[return-value]  # fmt: skip

    def watch(progress: Progress, batch: Batch, result: Result) -> None:
        found.losses.append(result.loss)
        found.norms.append(result.norms.double())

    stepper = _stepper(method, config, world, share, zero_stage)
    source = FixedBatches(batches, config.batch, share, world.rank)
    run = Run(
        method=method, stepper=stepper, loader=source, place=place, clock=clock, optimisation=config,
        micro_batch=share.micro, checkpoints=None, stop=Stop(LocalHost(), world), host=LocalHost(), watch=watch,
    )  # fmt: skip
    if rehearsal:
        rehearse(run, next(source.after(0, config.batch)))
    train(run, Segment(clock.end))
    found.names = stepper.names
    found.state = {name: value.detach().clone() for name, value in method.state_dict().items()}
    return found


def _stepper(
    method: Method, config: OptimisationConfig, world: World, share: Portion, zero_stage: int | None
) -> Stepper:
    groups = group_parameters(method)
    if zero_stage is None:
        return PlainStepper(method, groups, config, world)
    from training.engine.deepspeed import DeepSpeedStepper, derive_json

    engine = EngineConfig(zero_stage=zero_stage)
    settings = derive_json(engine, rows=share.rows, micro=share.micro, world=world.size)
    return DeepSpeedStepper(method, groups, config, world, settings=settings)
