import math

import pytest

from training.core.schedules import along, grown, teacher_temperature, warmup_cosine


def test_warmup_cosine__corners() -> None:
    def value(step: float) -> float:
        return warmup_cosine(step, base=1.0, final=0.1, total_steps=20, warmup_steps=5)

    assert value(0) == 0
    assert value(4) == value(4.5) == value(5) == 1.0  # two steps at the peak
    assert 0.1 < value(19) < 0.11
    assert value(20) == value(25) == pytest.approx(0.1)
    assert value(2.5) == pytest.approx((value(2) + value(3)) / 2)  # a step may be a fraction
    assert value(12.5) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))


def test_warmup_cosine__without_warm_up_and_constant() -> None:
    assert warmup_cosine(0, base=0.996, final=1.0, total_steps=10) == pytest.approx(0.996)
    assert warmup_cosine(5, base=0.996, final=1.0, total_steps=10) == pytest.approx(0.998)
    assert {warmup_cosine(step, base=0.04, final=0.04, total_steps=7) for step in range(7)} == {0.04}
    assert warmup_cosine(0, base=1.0, final=0.0, total_steps=9, warmup_steps=1, start=0.3) == 0.3


def test_teacher_temperature__corners() -> None:
    values = [teacher_temperature(epoch, warmup=0.04, final=0.07, warmup_epochs=4) for epoch in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert teacher_temperature(0, warmup=0.02, final=0.04, warmup_epochs=0) == 0.04
    assert teacher_temperature(0, warmup=0.02, final=0.04, warmup_epochs=1) == 0.02


def test_grown__linear_by_epoch_then_one() -> None:
    assert [grown(epoch, epochs=4) for epoch in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert grown(0, epochs=2.5) == pytest.approx(0.4)
    assert grown(0, epochs=0) == grown(0, epochs=0.3) == 1.0


def test_along__corners_between_and_beyond() -> None:
    points = ((2.0, 1.0), (4.0, 5.0), (8.0, 3.0))
    assert [along(points, epoch) for epoch in (0, 2, 3, 4, 6, 8, 99)] == pytest.approx([1, 1, 3, 5, 4, 3, 3])
    assert along(points[:1], 0) == along(points[:1], 9) == 1.0
