"""What torch.compile needs of a machine is missed before the first step, and blocks are compiled by themselves where
that works and is faster."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from datapipe.core.errors import ConfigError
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.config.build import build_method
from training.config.run_config import RunConfig
from training.core.host import lines_to
from training.core.world import World
from training.nn.drop_path import draw_path_masks, on_device
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Stack
from training.preflight import compiler
from training.preflight.compiler import BlockTrial, refuse_without_compiler, settle_compiled, together, tried, verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has all that it takes, in this folder."""
    for name in ("bin/g++", "bin/gcc", "include/Python.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "include"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(("device", "name", "variable"), [(CPU, "g++", "CXX"), (GPU, "gcc", "CC")])
def test_compiler__is_looked_for_by_device(
    machine: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str, variable: str
) -> None:
    refuse_without_compiler(device)
    (machine / "bin" / name).rename(machine / "bin" / "other")
    with pytest.raises(ConfigError, match=rf"there is none: {name.replace('+', '.')}") as missed:
        refuse_without_compiler(device)
    assert variable in missed.value.hint
    monkeypatch.setenv(variable, "other")
    refuse_without_compiler(device)


def test_compiler__headers_and_folder_are_missed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(machine / "bin" / "gcc" / "below"))
    with pytest.raises(ConfigError, match="a folder for what it compiles: Not a directory") as missed:
        refuse_without_compiler(CPU)
    assert missed.value.where == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    (machine / "include" / "Python.h").unlink()
    with pytest.raises(ConfigError, match="there is no .*Python.h"):
        refuse_without_compiler(CPU)


SMALL = ("--backbone.arch", "custom", "--backbone.size", "32", "16", "--backbone.patch", "8", "--backbone.width", "24",
         "--backbone.depth", "2", "--backbone.heads", "2", "--out", "x", "--stream.manifest", "x")  # fmt: skip


def small(*flags: str) -> RunConfig:
    return recipes.load("dino_vits", [*SMALL, *flags])


def settled(config: RunConfig, *, steps: int = 10_000, device: str = "cuda") -> tuple[set[bool], list[str]]:
    """(whether backbones are compiled, what was said)."""
    method, said = build_method(config), list[str]()
    with lines_to(said.append):
        settle_compiled(config, method, World(device=torch.device(device)), micro_batch=2, steps=steps)
    return {one.compiled for one in method.modules() if isinstance(one, VisionTransformer)}, said


@pytest.mark.parametrize(("trial", "compiled", "what"), [
    (BlockTrial("", 3e-3, 2e-3), True, "blocks are compiled: 2.00 ms for one instead of 3.00"),
    (BlockTrial("", 2e-3, 3e-3), False, "not compiled: they are no faster so, 3.00 ms for one instead of 2.00"),
    (BlockTrial("BackendError: no"), False, "not compiled: BackendError: no"),
])  # fmt: skip
def test_auto__follows_what_the_trial_finds(
    trial: BlockTrial, compiled: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "tried", lambda *_: trial)
    found, said = settled(small())
    assert found == {compiled} and said[-1].endswith(what)


@pytest.mark.parametrize(("flags", "steps", "device", "what"), [
    ((), compiler.LEAST_STEPS - 1, "cuda", "1,999 steps are fewer than the 2,000"),
    (("--engine.stepper", "deepspeed", "--engine.zero-stage", "3"), 10_000, "cuda", "zero_stage 3"),
    (("--engine.deterministic", "True"), 10_000, "cuda", "engine.deterministic"),
    (("--no-backbone.compile-blocks",), 10_000, "cuda", ""),
    ((), 10_000, "cpu", ""),
])  # fmt: skip
def test_auto__tries_nothing_where_it_cannot_pay(
    flags: tuple[str, ...], steps: int, device: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "tried", lambda *_: pytest.fail("it was tried"))
    found, said = settled(small(*flags), steps=steps, device=device)
    assert found == {False} and len(said) == bool(what) and what in "".join(said)


def _on_two_ranks(world: World, folder: str) -> tuple[list[BlockTrial], int]:
    """What the trial of a block finds, the compiler of the second rank broken; graphs that the backbone itself adds
    afterwards."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{world.rank}"
    if world.rank == 1:
        torch._inductor.config.cpp.cxx = (None, "false")
    backbone = VisionTransformer(BackboneConfig(arch="custom", size=(32, 16), patch=8, width=24, depth=2, heads=2,
                                                drop_path=0.2))  # fmt: skip
    stack, before = Stack(6, (32, 16), 8, 9), {name: value.clone() for name, value in backbone.state_dict().items()}
    found = together(world, lambda: tried(backbone, stack, "bf16", world))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    if world.rank == 1:
        return found, 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    drawn = draw_path_masks(backbone.config.drop_rates, seed=0, purpose="x", position=torch.arange(6), views=1)
    (dropped,) = on_device([drawn], torch.device("cpu"), whole=True)
    backbone.compiled = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone(torch.randn(6, 3, 32, 16), path_masks=dropped).cls.sum().backward()
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs


@pytest.mark.slow
def test_trial__compiles_once_for_the_run_and_tells_all_ranks_of_a_broken_compiler(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_two_ranks, str(tmp_path))
    assert first == second  # nothing more was compiled: blocks of the run are of the trial's graph
    (sound, broken), more = first
    assert sound.fault == "" and sound.plain_s > 0 < sound.compiled_s and more == 0
    assert broken.fault and verdict([sound, broken]) == broken.fault
