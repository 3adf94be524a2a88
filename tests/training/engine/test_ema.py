import pytest
import torch

from training.engine import ema


def test_ema__float32_equals_float64_over_a_thousand_steps() -> None:
    """Contract 1 of the house: parameters are float32, so that an average at .9999 does not stand still."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(500, generator=generator)
    low, high = {"w": student.clone()}, {"w": student.double()}
    for _ in range(1000):
        student = student + 0.01 * torch.randn(500, generator=generator)
        ema.update({"w": student}, low, 0.9999)
        ema.update({"w": student.double()}, high, 0.9999)
    assert float((low["w"].double() - high["w"]).abs().max()) < 1e-5
    assert float((high["w"] - student).abs().max()) > 0.1  # the average really lags behind

    half = {"w": torch.ones(1, dtype=torch.bfloat16)}  # what would happen otherwise
    ema.update({"w": torch.full((1,), 2.0)}, half, 0.9999)
    assert float(half["w"]) == 1.0


def test_ema__by_name_and_in_place() -> None:
    student = {"b": torch.tensor([2.0]), "a": torch.tensor([1.0]), "mask_token": torch.tensor([9.0])}
    kept = torch.zeros(1)
    teacher = {"a": kept, "b": torch.zeros(1)}
    ema.update(student, teacher, 0.75)
    assert teacher["a"] is kept and float(kept) == 0.25 and float(teacher["b"]) == 0.5
    ema.update(student, teacher, 1.0)
    assert float(kept) == 0.25
    with pytest.raises(AssertionError, match="'c'"):
        ema.update(student, {"c": torch.zeros(1)}, 0.5)


def test_ema__leaves_no_graph() -> None:
    teacher = {"w": torch.nn.Parameter(torch.zeros(1), requires_grad=False)}
    ema.update({"w": torch.nn.Parameter(torch.ones(1))}, teacher, 0.5)
    assert teacher["w"].grad_fn is None and float(teacher["w"]) == 0.5
