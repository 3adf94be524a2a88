import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from training.nn import teacher_targets


def logits(views: int = 2, batch: int = 4, prototypes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(views, batch, prototypes, dtype=torch.float64, generator=generator)


def naive_sinkhorn(rows: list[list[float]], temperature: float, iterations: int) -> list[list[float]]:
    q = [[math.exp(value / temperature) for value in row] for row in rows]
    for _ in range(iterations):
        for k in range(len(q[0])):
            total = sum(row[k] for row in q)
            for row in q:
                row[k] /= total
        for row in q:
            total = sum(row)
            row[:] = [value / total for value in row]
    return q


def test_centred__equals_naive() -> None:
    teacher, centre = logits(), torch.randn(1, 5, dtype=torch.float64)
    ours = teacher_targets.centred(teacher, centre, temperature=0.5)
    for t in range(2):
        for b in range(4):
            powers = [math.exp((float(teacher[t, b, k]) - float(centre[0, k])) / 0.5) for k in range(5)]
            expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
            torch.testing.assert_close(ours[t, b], expected, rtol=1e-12, atol=1e-12)


def test_centre_sum__adds_up_over_micro_batches_and_leaves_padding_out() -> None:
    teacher = logits(batch=5)
    teacher[:, 4] = 1e6  # padding
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0], dtype=torch.float64)
    parts = [teacher_targets.centre_sum(teacher[:, rows], weight[rows]) for rows in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(parts[0] + parts[1], teacher[:, :4].mean(dim=(0, 1))[None], rtol=1e-12, atol=1e-12)
    moved = torch.ones(1, 5, dtype=torch.float64)
    teacher_targets.move_centres([moved], [parts[0] + parts[1]], [0.9])
    torch.testing.assert_close(moved, 0.9 + 0.1 * (parts[0] + parts[1]))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_sinkhorn__equals_naive_loops_without_padding(temperature: float) -> None:
    teacher = logits(batch=4)
    teacher[:, 3] = 50.0  # padding
    weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=torch.float64)
    ours = teacher_targets.sinkhorn(teacher, weight, temperature=temperature)
    naive = naive_sinkhorn(teacher[:, :3].reshape(-1, 5).tolist(), temperature, 3)
    expected = torch.tensor(naive, dtype=torch.float64)
    torch.testing.assert_close(ours[:, :3].reshape(-1, 5), expected, rtol=1e-9, atol=0)


def test_sinkhorn__low_temperatures_stay_finite_and_balanced() -> None:
    torch.manual_seed(0)
    cosines = torch.randn(2, 64, 32).tanh()
    ours = teacher_targets.sinkhorn(cosines, torch.full((64,), 1 / 64), temperature=0.01, iterations=30)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.sum(dim=-1), torch.ones(2, 64))
    assert float(ours.sum(dim=(0, 1)).max()) < 2 * 128 / 32


def test_sinkhorn__rows_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks as two threads whose collectives meet at a barrier: one with three real rows, one with one."""
    meeting, waiting = threading.Barrier(2, timeout=300), []

    def all_reduce(values: Tensor, operation: Any = distributed.ReduceOp.SUM) -> None:
        waiting.append(values.clone())
        meeting.wait()
        both = torch.stack(waiting[-2:])
        values.copy_(both.amax(dim=0) if operation == distributed.ReduceOp.MAX else both.sum(dim=0))
        meeting.wait()

    teacher, weight = logits(batch=4), torch.full((4,), 0.25, dtype=torch.float64)
    whole = teacher_targets.sinkhorn(teacher, weight, temperature=0.2)
    padding = torch.full((2, 2, 5), 9.0, dtype=torch.float64)
    shares = [
        (teacher[:, :3], weight[:3]),
        (torch.cat([teacher[:, 3:], padding], dim=1), torch.tensor([0.25, 0, 0], dtype=torch.float64)),
    ]
    monkeypatch.setattr(teacher_targets, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(lambda share: teacher_targets.sinkhorn(*share, temperature=0.2), shares, timeout=300)
    torch.testing.assert_close(torch.cat([first, second[:, :1]], dim=1), whole, rtol=1e-12, atol=1e-12)
