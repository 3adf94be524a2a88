from typing import Any

import pytest
import torch

from tests.support.golden import golden, group, tolerance
from training.core.schedules import teacher_temperature, warmup_cosine


def cosine_series(about: dict[str, Any]) -> list[float]:
    per_epoch = about["niter_per_ep"]
    total = about["epochs"] * per_epoch
    return [
        warmup_cosine(
            step,
            base=about["base_value"],
            final=about["final_value"],
            total_steps=total,
            warmup_steps=about.get("warmup_epochs", 0) * per_epoch,
            start=about.get("start_warmup_value", 0.0),
        )
        for step in range(total)
    ]


def temperature_series(about: dict[str, Any]) -> list[float]:
    return [
        teacher_temperature(
            epoch,
            warmup=about["warmup_teacher_temp"],
            final=about["teacher_temp"],
            warmup_epochs=about["warmup_teacher_temp_epochs"],
        )
        for epoch in range(about["nepochs"])
    ]


@pytest.mark.parametrize(("prefix", "series"), [("cosine/", cosine_series), ("teacher_temp/", temperature_series)])
def test_schedules__equal_the_reference(prefix: str, series: Any) -> None:
    about, tensors = golden("schedules")
    cases = group(tensors, prefix)
    assert cases
    for name, theirs in cases.items():
        ours = torch.tensor(series(about["hyper_parameters"][prefix + name]), dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=tolerance(about, "all"), atol=1e-18)
