"""What a rate comes to: operations a second, and the share of what datasheets promise."""

from dataclasses import replace
from typing import Any

import pytest

from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.core.world import World
from training.preflight.calculated.operations import flops_of_image
from training.trainer.monitoring.utilisation import of_devices, yardstick

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def recipe(precision: Any = "bf16") -> RunConfig:
    config = load("pass_vits")
    return replace(config, optimisation=replace(config.optimisation, precision=precision))


def test_utilisation__is_of_all_ranks_together() -> None:
    """PASS ViT-S, 91.6 GFLOP an image, on eight H100: 10 800 images a second would be all they have... times 8."""
    measure = of_devices(recipe(), [H100] * 8)
    full = 8 * 989.5e12 / flops_of_image(recipe())
    assert 86_000 < full < 87_000
    assert measure.of(full / 4) == pytest.approx({"model_tflops": 989.5 / 4, "mfu": 0.25})
    assert measure.in_words() == ("91.6 GFLOP an image; MFU is the share of what bf16 has by datasheet: "
                                  "990 TFLOP/s, NVIDIA H100 datasheet")  # fmt: skip


def test_utilisation__of_unlike_gpus_adds_their_peaks() -> None:
    measure = of_devices(recipe(), [H100, A100])
    assert measure.peak == (989.5 + 312) * 1e12 and "A100" in measure.about and "H100" in measure.about


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 67e12), ("fp16", 989.5e12)])
def test_utilisation__is_of_the_precision_of_the_run(precision: str, peak: float) -> None:
    assert of_devices(recipe(precision), [H100]).peak == peak


@pytest.mark.parametrize("devices", [[H100, "NVIDIA Strange"], ["NVIDIA Strange"], ["Tesla T4"]])
def test_utilisation__is_not_told_where_a_peak_is_not_known(devices: list[str]) -> None:
    measure = of_devices(recipe(), devices)
    assert measure.of(100.0).keys() == {"model_tflops"} and measure.to_json()["peak_flops"] is None
    assert f"no bf16 rate of {devices[-1]} is known" in measure.in_words()


def test_utilisation__of_cpus_is_a_rate_alone() -> None:
    measure = yardstick(recipe("fp32"), World())
    assert measure.of(1e3) == pytest.approx({"model_tflops": flops_of_image(recipe()) / 1e9})
    assert measure.in_words() == "91.6 GFLOP an image"
