"""What a run on CPUs is in for: operations as PyTorch counts them, a warning, and a refusal before any allocation."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datapipe.core.cli import run
from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import generated, recipe
from tests.training.tiny_recipe import tiny, with_views
from training.__main__ import main
from training.config.recipe_toml import load
from training.config.run_plan import clock_of
from training.core.world import World
from training.preflight import cpu_forecast
from training.preflight.calculated.operations import flops_of_image
from training.recipes import SHIPPED

METHODS = ("dino_vits", "pass_vits", "personvit_vits", "personmae_vits")


@pytest.mark.parametrize("name", METHODS)
def test_flops__are_those_of_a_real_step(name: str) -> None:
    """On real tensors; losses weigh some percent in so narrow a network (`test_operations.py` has the real ones)."""
    images = 4
    config = tiny(name, images=images)
    method, views = with_views(config)
    with FlopCounterMode(display=False) as counter:
        method(views, clock_of(config, 200).at(0)).loss.backward()
    assert flops_of_image(config) == pytest.approx(counter.get_total_flops() / images, rel=0.1)


def test_warning__of_a_recipe_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forecast, "measured_rate", lambda config: 100e9)
    config = load(SHIPPED / "pass_vitb.toml")
    clock = clock_of(config, 100_000)
    said = cpu_forecast.warning(config, clock, World())
    seconds = flops_of_image(config) * clock.end / 100e9
    assert f"takes about {cpu_forecast.in_days(seconds)} on 1 CPU worker" in said and "no GPU" in said
    half = cpu_forecast.warning(config, clock, World(size=2, local_size=2))
    assert f"takes about {cpu_forecast.in_days(seconds / 2)} on 2 CPU workers" in half
    assert cpu_forecast.warning(config, clock, World(device=torch.device("cuda"))) == ""


def test_warning__leaves_short_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not even measured."""
    monkeypatch.delattr(cpu_forecast, "measured_rate")
    demo = load(SHIPPED / "demo.toml")
    assert cpu_forecast.warning(demo, clock_of(demo, 3_000), World()) == ""


def test_rate__is_that_of_the_recipes_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass through a block is counted as PyTorch counts it, and leaves random numbers alone."""
    config, state = tiny("pass_vits", images=4), torch.get_rng_state()
    clock = iter([0.0, 0.0, 2.0])  # one pass, that took two seconds
    monkeypatch.setattr(cpu_forecast.time, "perf_counter", lambda: next(clock))
    with FlopCounterMode(display=False) as counter:
        rate = cpu_forecast.measured_rate(config, seconds=1.0)
    counted = counter.get_total_flops() / 2  # with the one before
    assert rate == pytest.approx(counted / 2.0, rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("seconds", "words"), [
    (100_000, "28 hours"), (212.3 * 86_400, "212 days"), (5 * 365 * 86_400, "5 years")])  # fmt: skip
def test_in_days(seconds: float, words: str) -> None:
    assert cpu_forecast.in_days(seconds) == words


@pytest.mark.slow
def test_memory__that_cannot_suffice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(SHIPPED / "pass_vitb.toml")
    need = cpu_forecast.needed(config, 1)
    monkeypatch.setattr(cpu_forecast, "available_memory", lambda: need)
    cpu_forecast.refuse_want_of_memory(config, World(), place="here")
    monkeypatch.setattr(cpu_forecast, "available_memory", lambda: need - 1)
    with pytest.raises(ConfigError, match="cannot suffice") as caught:
        cpu_forecast.refuse_want_of_memory(config, World(), place="here")
    assert "optimisation.micro_batch = 64, on here" in caught.value.where and "--dry-run" in caught.value.hint
    fitting = re.search(r"--optimisation.micro-batch (\d+) would fit", caught.value.hint)
    assert fitting
    smaller = load(SHIPPED / "pass_vitb.toml", ["--optimisation.micro-batch", fitting[1]])
    assert cpu_forecast.needed(smaller, 1) < need
    cpu_forecast.refuse_want_of_memory(config, World(device=torch.device("cuda")), place="here")


@pytest.mark.slow
def test_memory__is_asked_of_a_machine_for_all_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(SHIPPED / "pass_vits.toml")
    monkeypatch.setattr(cpu_forecast, "available_memory", lambda: 2 * cpu_forecast.needed(config, 2) - 1)
    cpu_forecast.refuse_on_this_machine(config, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match="2 workers need") as caught:
        cpu_forecast.refuse_on_this_machine(config, 2, torch.device("cpu"))
    assert "--cluster.max-workers 1" in caught.value.hint


@pytest.mark.slow
def test_pretrain__is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, generated(tmp_path), str(tmp_path / "run"))
    monkeypatch.setattr("training.trainer.pretrain.initial_method", lambda config: pytest.fail("was built"))
    monkeypatch.setattr(cpu_forecast, "available_memory", lambda: 100_000)
    assert run(main, ["pretrain", str(path)]) == 1
    errors = capsys.readouterr().err
    assert "error: the memory of this machine cannot suffice" in errors and "optimisation.micro_batch = 6" in errors
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(("free", "left", "found"), [(5, None, 5), (5, 3, 3), (2, 3, 2)])
def test_available_memory__is_what_the_machine_and_the_control_groups_leave(
    monkeypatch: pytest.MonkeyPatch, free: int, left: int | None, found: int
) -> None:
    monkeypatch.setattr(cpu_forecast.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(cpu_forecast, "memory_left", lambda: left)
    assert cpu_forecast.available_memory() == found
