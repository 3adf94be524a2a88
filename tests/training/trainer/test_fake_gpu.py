"""Every recipe's step on tensors that only say that they are on a GPU: operands on different devices, results left on
the host, and waits for the GPU in the forward pass show without one.

Real are the recipe with its widths and heads, the module (made on the meta device, then `to_empty`), `BatchToDevice`,
the method's forward pass under autocast, what the stepper collects and its norms, `after_step`, the moving average, and
what evaluation embeds. Two blocks stand for all. Not here: the backward pass, which wants a CUDA context, DeepSpeed,
kernels, and races between streams (`tests/training/core/test_device_copy.py`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.streams import Streams
from training import methods
from training.config import build
from training.config.batch_split import split_batch
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.core.device_copy import table
from training.core.world import World
from training.engine import ema
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.methods import distillation, identity_batch, personmae
from training.methods.base import Method, TrainingProgress
from training.nn import drop_path
from training.recipes import SHIPPED
from training.reid import embed
from training.trainer.batch_to_device import BatchToDevice

GPU = torch.device("cuda", 0)
IMAGES = 4
LARGER = ("pass_vitb", "vitl", "personvit_vitb", "personmae_vitb", "384")
"""The same operations as a smaller recipe."""
RECIPES = [
    pytest.param(name, marks=[pytest.mark.slow] * name.endswith(LARGER))
    for name in sorted(path.stem for path in SHIPPED.glob("*.toml") if not path.stem.endswith("_4096"))
]
NOW = TrainingProgress(samples=0, step=0, epoch=0, fraction=0.0, total_steps=10, epoch_steps=5.0, seed=1, batch=IMAGES)
ON_HOST = {"position", "sample"}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which CUDA tensors have no memory, and CUDA's autocast is not switched off for want of a GPU."""
    table.cache_clear()
    Streams(monkeypatch)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    table.cache_clear()  # its tensors have no memory


def small(name: str) -> RunConfig:
    """A shipped recipe, two blocks deep; with identities where it learns from them."""
    config = load(SHIPPED / f"{name}.toml")
    width, _, heads, _ = config.backbone.shape
    shallow = dataclasses.replace(config.backbone, arch="custom", width=width, depth=2, heads=heads)
    method: Any = config.method
    if method.name == "supervised":
        method = dataclasses.replace(method, classes=7)
    if method.name == "cluster_contrast":
        method = dataclasses.replace(method, norm_group=IMAGES // 2, images=7)
    return dataclasses.replace(config, backbone=shallow, method=method)


class HostPositions:
    """The positions of a batch, or factors drawn from them, as host numbers, whatever mode tensors are in."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def numpy(self) -> np.ndarray:
        return self.values


def keep_host_numbers(monkeypatch: pytest.MonkeyPatch, position: np.ndarray) -> None:
    """Numbers that the host draws from positions are drawn outside the mode, in which host tensors have none. What is
    handed to these functions must be on the host: from a GPU it would have to be waited for."""
    real_masks = drop_path.draw_path_masks

    def draw_path_masks(rates: Any, **given: Any) -> HostPositions | None:
        assert given.pop("position").device.type == "cpu"
        with unset_fake_temporarily():
            drawn = real_masks(rates, position=torch.from_numpy(position), **given)
            return None if drawn is None else HostPositions(drawn.numpy())

    for module in (distillation, personmae, identity_batch):
        monkeypatch.setattr(module, "draw_path_masks", draw_path_masks)


class NoWait(TorchDispatchMode):
    """Fails at a copy between host and GPU that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[str, Any] = kwargs or {}
        result = func(*args, **given)
        name = func._schema.name
        if name == "aten::_to_copy":
            self._judge(args[0], result, bool(given.get("non_blocking")))
        elif name == "aten::copy_":
            self._judge(args[1], args[0], bool(given.get("non_blocking") or (len(args) > 2 and args[2])))
        return result

    @staticmethod
    def _judge(source: Tensor, target: Tensor, non_blocking: bool) -> None:
        assert not (source.is_cuda and not target.is_cuda), "a copy from the GPU to the host"
        assert source.is_cuda or not target.is_cuda or non_blocking, "a copy to the GPU from ordinary memory"


def devices(values: dict[str, Tensor]) -> dict[str, str]:
    return {name: torch.device(value.device).type for name, value in values.items()}  # NumPy's are named "cpu"


def check_forward(stepper: PlainStepper, batch: Any) -> None:
    """Views, outcome and all that is collected of it: on the GPU, and nobody waited."""
    place = BatchToDevice(GPU)
    on_host = ON_HOST | ({"erased"} if batch.erasures else set())
    with NoWait():
        views = place(batch)
        assert {name for name, device in devices(views).items() if device == "cpu"} == on_host  # type: ignore[arg-type]
        outcome = stepper.forward(views, NOW)
    found = {"loss": outcome.loss, **outcome.sums, **outcome.metrics, **stepper._totals}
    assert set(devices(found).values()) == {"cuda"}
    assert all(value.dtype == torch.float32 for value in stepper._totals.values())
    stepper.method.after_step(outcome.sums, NOW)


def check_update(stepper: PlainStepper) -> None:
    """Norms, and the teacher that follows the student."""
    for value in stepper.parameters.values():
        value.grad = torch.empty_like(value)
    assert stepper._norms().device.type == "cuda"
    method = stepper.method
    if "teacher" in method._modules:
        ema.update(dict(method.student.named_parameters()), dict(method.teacher.named_parameters()), 0.9)
    assert set(devices({**dict(method.named_parameters()), **dict(method.named_buffers())}).values()) == {"cuda"}


def check_embedding(config: RunConfig, method: Method) -> None:
    pixels = np.zeros((2, *config.backbone.size, 3), np.uint8)
    with NoWait(), torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        images = embed.normalise(pixels, torch.float32, GPU, embed.EmbedConfig())
        tokens = method.backbone().eval().features(images)
    assert {tokens.cls.device.type, tokens.parts.device.type, tokens.patches.device.type} == {"cuda"}


@pytest.mark.parametrize("name", RECIPES)
def test_step__on_a_fake_gpu(name: str, fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(name)
    batch = build.fake_batch(build.view_spec(config), split_batch(IMAGES, IMAGES, 1), config)
    keep_host_numbers(monkeypatch, batch.position.copy())
    with torch.device("meta"):
        method = methods.build(config.method, config.backbone)
    method.precision = config.optimisation.precision
    with fake_gpu:
        method = method.to_empty(device=GPU)
        stepper = PlainStepper(method, group_parameters(method), config.optimisation, World(device=GPU))
        check_forward(stepper, batch)
        check_update(stepper)
        check_embedding(config, method)


def test_fake_gpu__shows_what_it_is_for(fake_gpu: FakeTensorMode) -> None:
    """Each kind of mistake, made on purpose."""
    with fake_gpu:
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        with pytest.raises(Exception, match="the same device"):
            there * here
        with pytest.raises(DynamicOutputShapeException):
            there[there > 0]
        with pytest.raises(DataDependentOutputException):
            bool(there.sum() > 0)
        for copied, back in ((here, GPU), (there, torch.device("cpu"))):
            with pytest.raises(AssertionError, match="a copy"), NoWait():
                copied.to(back)
