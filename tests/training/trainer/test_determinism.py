"""`engine.deterministic`: what it sets while a run lasts, and what a run says that it guarantees."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.end_to_end.tiny import final_state, generated, recipe
from tests.training.tiny_recipe import tiny
from training.__main__ import main
from training.core.world import World
from training.nn.vision_transformer import BackboneConfig, VisionTransformer, _weights
from training.trainer.determinism import WORKSPACE, deterministic, guarantee

GPU = World(device=torch.device("cuda", 0))


def settings() -> tuple[Any, ...]:
    """All that the key may change."""
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled(),
            os.environ.get(WORKSPACE))  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = settings()
    yield
    assert settings() == before


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_deterministic__in_effect_within_and_as_before_after_an_error(
    workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workspace is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with pytest.raises(KeyError), deterministic(True):
        assert settings() == (True, False, False, False, workspace or ":4096:8")
        raise KeyError
    assert settings() == before
    with deterministic(False):
        assert settings() == before


@pytest.mark.slow
def test_pretrain__the_key_changes_no_bit_on_a_cpu_and_the_run_says_what_holds(tmp_path: Path) -> None:
    path = recipe(tmp_path, generated(tmp_path), "none")
    states = []
    for name in ("with", "without"):
        flags = ("--out", str(tmp_path / name), "--engine.deterministic", str(name == "with"))
        assert main(["pretrain", str(path), *flags]) == 0
        states.append(final_state(tmp_path / name))
        said = json.loads((tmp_path / name / "environment.json").read_text())["guarantee"]
        assert said.startswith("bit-identical weights at the same world size")
        assert f"stopped and resumed: {said}" in (tmp_path / name / "log.txt").read_text()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_guarantee__of_a_gpu_hangs_on_the_key() -> None:
    config = tiny("pass_vits", images=2)
    fixed = replace(config, engine=replace(config.engine, deterministic=True))
    assert "engine.deterministic = true" in guarantee(config, GPU)
    assert guarantee(fixed, GPU).startswith("bit-identical weights") and "NCCL" not in guarantee(fixed, GPU)
    assert "NCCL" in guarantee(fixed, replace(GPU, size=2))
    lowered = replace(config, optimisation=replace(config.optimisation, precision="bf16"))
    assert "up to rounding" in guarantee(lowered, World())


@pytest.mark.parametrize("size", [(8, 4), (16, 8), (24, 12), (5, 9)])
def test_positions__two_products_resize_as_the_bicubic_kernel(size: tuple[int, int]) -> None:
    table = torch.randn(1, 6, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = tuple((new + 0.1) / old for new, old in zip(size, (16, 8), strict=True))
    expected = F.interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)
    down, across = (_weights(old, factor) for old, factor in zip((16, 8), factors, strict=True))
    torch.testing.assert_close(down @ table @ across.T, expected, rtol=1e-12, atol=1e-13)


class Named(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in args)
        self.names |= {func._schema.name} if on_gpu else set()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [True, False])
def test_positions__no_bicubic_kernel_on_a_gpu_that_must_be_deterministic(wanted: bool) -> None:
    config = BackboneConfig(arch="custom", width=24, depth=1, heads=2, size=(64, 32), patch=8)
    with torch.device("meta"):
        backbone = VisionTransformer(config)
    with FakeTensorMode(allow_non_fake_inputs=True), deterministic(wanted):
        backbone = backbone.to_empty(device=GPU.device)
        with Named() as named:
            table = backbone.patch_positions(4, 2)
    assert table.device == GPU.device and table.shape == (1, 8, 24)
    assert ("aten::upsample_bicubic2d" in named.names) is not wanted
