"""Out of memory, whoever says so, is one clear error with settings that need less, and no reason to restart."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import training.__main__
from datapipe.core.cli import FAILED, run
from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import command, finished, generated, recipe
from tests.support.golden import ROOT
from tests.training.greedy import ENVIRONMENT, TOO_MANY
from tests.training.tiny_recipe import tiny
from training.config.recipe_toml import load
from training.core.out_of_memory import device_bytes, is_out_of_memory, scoring_memory
from training.core.world import World
from training.preflight.calculated.memory import calculate, census
from training.preflight.memory_advice import training_memory
from training.recipes import SHIPPED
from training.reid.embed import EmbedConfig, embed


def refused(allocate: Callable[[], Any]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    return error.value


def caused_by(cause: BaseException) -> BaseException:
    error = ValueError("a wrapper's own words")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 39.39 GiB"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nLast error: Failed to CUDA calloc 6291456 "
                                       "bytes"),
    torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
    OSError(12, "Cannot allocate memory"),
    refused(lambda: torch.empty(TOO_MANY)),
    refused(lambda: np.ones(TOO_MANY)),
    caused_by(refused(lambda: torch.empty(TOO_MANY))),
], ids=["gpu", "runtime", "cublas", "cudnn", "nccl", "nccl_runtime", "system", "cpu", "numpy", "cause"])  # fmt: skip
def test_is_out_of_memory__in_the_words_of_each_allocator(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory of a person"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), OSError(28, "No space left"),
], ids=["illegal_access", "no_allocator", "cublas", "disk"])  # fmt: skip
def test_is_out_of_memory__not_of_other_errors(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), training_memory(tiny("dino_vits", images=2), World()):
        raise error


def said_of(config: Any, **world: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error, training_memory(config, World(**world)):
        torch.empty(TOO_MANY)
    return error.value


def test_training_memory__names_a_micro_batch_that_needs_less() -> None:
    config = load(SHIPPED / "pass_vitl.toml")
    error = said_of(config, rank=3, size=8)
    sizes = census(config)
    smaller = replace(config, optimisation=replace(config.optimisation, micro_batch=16))
    now, then = (calculate(one, sizes, world=8, cuda=False).needed for one in (config, smaller))
    assert f"rank 3 of 8: as calculated, this configuration needs {now / 1e9:.2f} GB" in error.what
    assert "can't allocate memory" in error.what and error.where.startswith("optimisation.micro_batch = 32,")
    assert "--optimisation.micro-batch" in error.hint and "--backbone.checkpoint-blocks True" in error.hint
    assert then < now and "--dry-run" in error.hint


def test_training_memory__a_batch_that_must_stay_whole_shrinks_with_its_micro_batch() -> None:
    config = load(SHIPPED / "supervised.toml")
    error = said_of(config)
    half = config.optimisation.batch // 2
    assert f"--optimisation.batch {half} --optimisation.micro-batch {half} (" in error.hint
    assert "--dry-run" not in error.hint, "there is none of fine-tuning"


def test_training_memory__says_when_it_should_fit() -> None:
    assert "something else may hold the rest" in said_of(tiny("dino_vits", images=2)).what


def test_scoring_memory__names_its_own_batch() -> None:
    with pytest.raises(ConfigError, match="with 48 images embedded at once") as error, scoring_memory(48, "cpu"):
        torch.empty(TOO_MANY)
    assert error.value.where == "embed_batch = 48" and "--embed-batch 24" in error.value.hint


def test_embed__out_of_memory_names_the_batch() -> None:
    class Greedy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def features(self, images: torch.Tensor) -> Any:
            return torch.empty(TOO_MANY)

    png = b"P6 8 16 255\n" + bytes(8 * 16 * 3)
    with pytest.raises(ConfigError, match="7 images embedded at once"):
        embed(Greedy(), ["a"], lambda _: png, size=(16, 8), config=EmbedConfig(batch=7))


@pytest.mark.parametrize("place", [
    "training.nn.vision_transformer.VisionTransformer.outputs", "training.engine.plain.PlainStepper.backward",
    "training.engine.plain.PlainStepper._advance", "training.trainer.pretrain.make_stepper",
], ids=["forward", "backward", "step", "building"])  # fmt: skip
@pytest.mark.slow
def test_pretrain__out_of_memory_ends_it_with_one_error(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, generated(tmp_path), str(tmp_path / "run"))
    monkeypatch.setattr(place, lambda *_, **__: torch.empty(TOO_MANY))
    code = run(training.__main__.main, ["pretrain", str(path)])
    errors = capsys.readouterr().err
    assert code == FAILED and errors.count("error: out of memory") == 1 and "Traceback" not in errors
    assert "optimisation.micro_batch = 6, images at once on a rank: 6" in errors
    assert f"`python -m training pretrain {tmp_path}/run/config.toml --dry-run" in errors
    assert (tmp_path / "run" / "config.toml").is_file()


@pytest.mark.slow
def test_pretrain__out_of_memory_under_ray_is_not_tried_again(tmp_path: Path) -> None:
    path = recipe(tmp_path, generated(tmp_path), str(tmp_path / "run"))
    flags = ("--cluster.max-workers", "1", "--cluster.environment", ENVIRONMENT)
    code, output, errors = finished(command("cluster", "pretrain", str(path), *flags, PYTHONPATH=str(ROOT)))
    assert code == FAILED and "Traceback" not in errors, output + errors
    assert "error: out of memory on the host" in errors and "micro_batch = 6" in errors
    assert "workers ended" not in output and not any(
        json.loads(line)["kind"] == "crash" for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()
    )


def test_device_bytes__are_a_share_of_the_least_limit_of_all_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.core.out_of_memory.memory_limit", lambda: 8_000)
    assert device_bytes(World(device=torch.device("cpu"), local_size=2)) == 4_000
    monkeypatch.setattr("training.core.out_of_memory.memory_limit", lambda: None)
    assert device_bytes(World(device=torch.device("cpu"))) > 8_000
