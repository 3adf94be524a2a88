"""Drives the Method, loop and steppers that users run over the fixed batches of a golden training trajectory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datapipe.stream.batch import Batch, LoaderCounters
from tests.support.golden import golden, group
from training.config.batch_split import BatchSplit, split_batch
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.world import World
from training.engine.clock import Clock
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.settings import EngineConfig, OptimisationConfig
from training.engine.stepper import Result, Stepper
from training.methods import build
from training.methods.base import Method, TrainingProgress, Views
from training.methods.dino import DinoConfig
from training.methods.pass_reid import PassConfig
from training.methods.personvit import PersonVitConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig
from training.trainer.loop import Segment, TrainingRun, rehearse, train
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.nonfinite import Faults, describe
from training.weights.counted_keys import load_counted


@dataclass
class Trajectory:
    """What a run over the golden batches gave, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    wander: dict[str, Tensor] = field(default_factory=dict)
    """How far float32 may move each trained entry by round-off alone. On the yardstick only: plain, float64."""


NOISE = 1e-6
"""Round-off of a float32 gradient over the tensor's largest. On the golden trajectories it is 2e-6 at the worst entry
of a typical tensor and 1e-5 at the worst of all."""


def wander_of_step(stepper: PlainStepper) -> dict[str, Tensor]:
    """How far one step of AdamW may have moved each entry because of round-off in its gradient.

    AdamW divides by the root of the second moment v, so that round-off counts for more the smaller an entry's
    gradients are beside the tensor's, up to whole steps in either direction where they are nothing but round-off:

        lr * min(2, NOISE * max_j sqrt(v_j) / sqrt(v_i)),    v without its bias towards zero
    """
    found = {}
    names = {parameter: name for name, parameter in stepper.parameters.items()}
    for group_ in stepper.optimizer.param_groups:
        for parameter in group_["params"]:
            state = stepper.optimizer.state.get(parameter)
            if state:
                unbiased = state["exp_avg_sq"] / (1 - group_["betas"][1] ** float(state["step"]))
                root = unbiased.sqrt() + group_["eps"]
                found[names[parameter]] = group_["lr"] * (NOISE * root.max() / root).clamp(max=2)
    return found


class Noting(Observer):
    """Calls a function with each step."""

    def __init__(self, note: Callable[[StepDone], None]) -> None:
        self._note = note

    def step(self, step: StepDone) -> None:
        self._note(step)


class NoFaults(Faults):
    """The golden trajectories have none."""

    def __init__(self) -> None:
        """No run folder."""

    def handle(self, progress: TrainingProgress, batch: Batch, result: Result, names: list[str]) -> None:
        raise AssertionError(describe(result, names))


class FixedBatches:
    """The golden batches in order, epoch after epoch; this rank's rows of each, padded like the loader's."""

    intake = LoaderCounters()

    def __init__(self, batches: list[dict[str, np.ndarray]], size: int, split: BatchSplit, rank: int) -> None:
        self.batches, self.size, self.split, self.rank = batches, size, split, rank

    def after(self, position: int, until: int) -> Iterator[Batch]:
        for start in range(position, until, self.size):
            yield self._rows(self.batches[start // self.size % len(self.batches)], start)

    def _rows(self, views: dict[str, np.ndarray], start: int) -> Batch:
        low = self.rank * self.split.per_rank
        rows = np.arange(low, low + self.split.per_rank)
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


class Case(NamedTuple):
    """One golden trajectory and the method that is to follow it."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    prefix: str
    """In front of the names of results in the file."""
    make: Callable[[], Method]
    """The method in its initial state."""
    batches: list[dict[str, np.ndarray]]

    @property
    def setting(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.about["hyper_parameters"]
        return settings

    def result(self, name: str) -> Tensor:
        """A tensor that the reference's run ended with or measured."""
        return self.tensors[self.prefix + name]

    def results(self, prefix: str) -> dict[str, Tensor]:
        found = group(self.tensors, self.prefix + prefix)
        assert found, prefix
        return found


CASES = ("train_dino", "train_pass", "train_pass on a CPU", "train_ibot")
"""Golden items; PASS also with the resize of its position table at native size, as the reference does it on a CPU."""


def case_of(name: str) -> Case:
    """The golden trajectory of this name and everything to run it."""
    item, _, variant = name.partition(" ")
    about, tensors = golden(item)
    setting = about["hyper_parameters"]
    backbone = BackboneConfig(
        arch="custom", size=tuple(setting["img_size"]), patch=setting["patch_size"], width=setting["embed_dim"],
        depth=setting["depth"], heads=setting["num_heads"], mlp_ratio=setting["mlp_ratio"],
        resize_positions_at_native_size=bool(variant),
    )  # fmt: skip
    config = {"dino": dino_config, "pass": pass_config, "ibot": personvit_config}[setting["objective"]](setting)
    prefix = "stored_pos/" if item == "train_pass" and not variant else ""

    def make() -> Method:
        method = build(config, backbone)
        initial = group(tensors, "init/")
        for network in (method.student, method.teacher):
            load_counted(network, {name: initial[name] for name in network.state_dict()})
        surplus = initial.keys() - method.student.state_dict().keys()
        assert all(name.startswith("head.last_layer2.") for name in surplus), surplus  # shared: listed twice
        assert all(torch.equal(initial[name], initial[name.replace("layer2", "layer")]) for name in surplus)
        return method

    return Case(about, tensors, prefix, make, batches_of(setting, tensors))


def shared_settings(setting: dict[str, Any]) -> dict[str, Any]:
    """What the configurations of all three methods have in common."""
    loss, head = setting["loss"], setting["head"]
    return {
        "local_size": tuple(setting["local_size"]),
        "student_temp": loss["student_temp"],
        "warmup_teacher_temp": loss["warmup_teacher_temp"],
        "teacher_temp": loss["teacher_temp"],
        "teacher_temp_warmup_epochs": loss["warmup_teacher_temp_epochs"],
        "centre_momentum": loss["center_momentum"],
        "freeze_last_layer_epochs": setting["freeze_last_layer_epochs"],
        "head": HeadConfig(
            out_dim=head["out_dim"], hidden=head["hidden_dim"], bottleneck=head["bottleneck_dim"],
            layers=head["nlayers"], norm_last_layer=head["norm_last_layer"],
        ),
    }  # fmt: skip


def dino_config(setting: dict[str, Any]) -> DinoConfig:
    return DinoConfig(locals=setting["local_views"], **shared_settings(setting))


def pass_config(setting: dict[str, Any]) -> PassConfig:
    parts = sum(name.startswith("backbone.part_token") for name in setting["trainable_parameters"])
    return PassConfig(parts=parts, locals_per_part=setting["local_views"] // parts, **shared_settings(setting))


def personvit_config(setting: dict[str, Any]) -> PersonVitConfig:
    loss, head = setting["loss"], setting["head"]
    return PersonVitConfig(
        locals=setting["local_views"], patch_out_dim=head["patch_out_dim"],
        patch_head="shared" if head["shared_head_student_and_teacher"] else "separate",
        warmup_teacher_patch_temp=loss["warmup_teacher_temp2"], teacher_patch_temp=loss["teacher_temp2"],
        patch_centre_momentum=loss["center_momentum2"], lambda_dino=loss["lambda1"], lambda_mim=loss["lambda2"],
        **shared_settings(setting),
    )  # fmt: skip


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
    """The golden batches as the method's named views, [V, B, 3, H, W], and its masks, [V, B, rows, columns]."""
    found = []
    for number in range(setting["iterations_per_epoch"]):
        views = [value for _, value in sorted(group(tensors, f"batch{number}/view").items())]
        split = setting["global_views"]
        found.append({"global": torch.stack(views[:split]).numpy(), "local": torch.stack(views[split:]).numpy()})
        masks = [value for _, value in sorted(group(tensors, f"batch{number}/mask").items())]
        if masks:
            found[-1]["mask"] = torch.stack(masks).numpy()
    return found


def run_case(world: World, case: Case, **options: Any) -> Trajectory:
    """A golden trajectory from its start; `options` as in `run_trajectory`."""
    return run_trajectory(world, case.make, case.setting, case.batches, **options)


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
    bucket: int = EngineConfig().bucket,
    **changes: Any,
) -> Trajectory:
    """The whole trajectory through `training.trainer.loop.train`; `zero_stage` None: the plain stepper. `changes`:
    settings of the optimisation that are others."""
    config = replace(optimisation_of(setting), **changes)
    method = make().to(dtype)
    split = split_batch(config.batch, micro_batch or config.batch, world.size)
    clock = Clock(config.batch, config.batch * setting["iterations_per_epoch"], config.epochs, seed=0)
    found = Trajectory()

    def place(batch: Batch) -> Views:
        views = {name: torch.from_numpy(array) for name, array in batch.views.items()}
        views = {name: value.to(dtype) if value.is_floating_point() else value for name, value in views.items()}
        return {**views, "position": torch.from_numpy(batch.position), "sample": torch.from_numpy(batch.sample),
                "weight": torch.from_numpy(batch.weight).to(dtype)}  # type: ignore[return-value]  # fmt: skip

    def watch(step: StepDone) -> None:
        result = step.result
        found.losses.append(result.loss)
        found.norms.append(result.norms.double())
        found.metrics.append(result.metrics)
        if isinstance(stepper, PlainStepper) and dtype == torch.float64 and config.optimizer == "adamw":
            for name, value in wander_of_step(stepper).items():
                found.wander[name] = found.wander.get(name, torch.zeros_like(value)) + value

    stepper = _stepper(method, config, world, split, zero_stage, bucket)
    source = FixedBatches(batches, config.batch, split, world.rank)
    run = TrainingRun(
        method=method, stepper=stepper, loader=source, place=place, clock=clock, optimisation=config,
        micro_batch=split.micro_batch, checkpoints=None, host=LocalHost(), faults=NoFaults(), exchange=Exchange(world),
        observers=[Noting(watch)],
    )  # fmt: skip
    if rehearsal:
        rehearse(run, next(source.after(0, config.batch)))
    train(run, Segment(clock.end))
    found.names = stepper.names
    found.state = model_state(stepper, world)
    return found


def model_state(stepper: Stepper, world: World) -> dict[str, Tensor]:
    """Parameters and buffers, put together from what the ranks hold."""
    found: dict[str, Tensor] = {}
    for pieces in world.all_gather([(*piece[:3], piece.values.cpu().clone()) for piece in stepper.pieces({})]):
        for key, shape, start, values in pieces:
            whole = found.setdefault(key.removeprefix("model/"), torch.empty(shape, dtype=values.dtype))
            whole.view(-1)[start : start + len(values)] = values
    return found


def _stepper(
    method: Method,
    config: OptimisationConfig,
    world: World,
    split: BatchSplit,
    zero_stage: int | None,
    bucket: int = EngineConfig().bucket,
) -> Stepper:
    groups = group_parameters(method)
    if zero_stage is None:
        return PlainStepper(method, groups, config, world)
    from training.engine.deepspeed import DeepSpeedStepper, derive_json

    engine = EngineConfig(zero_stage=zero_stage, bucket=bucket)
    settings = derive_json(engine, rows=split.per_rank, micro=split.micro_batch, world=world.size,
                           reduction=config.reduction)  # fmt: skip
    return DeepSpeedStepper(method, groups, config, world, settings=settings)
