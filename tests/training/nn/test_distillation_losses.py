import math

import pytest
import torch

from training.nn.distillation_losses import entropy, pair_cross_entropies


@pytest.mark.parametrize(("students", "teachers"), [(5, 2), (2, 2), (3, 1), (1, 2)])
def test_pair_cross_entropies__equal_naive_loops(students: int, teachers: int) -> None:
    torch.manual_seed(0)
    batch, prototypes, temperature = 3, 6, 0.3
    student = torch.randn(students, batch, prototypes, dtype=torch.float64)
    targets = torch.softmax(torch.randn(teachers, batch, prototypes, dtype=torch.float64), dim=-1)
    ours = pair_cross_entropies(student, targets, student_temp=temperature)
    expected = []
    for t in range(teachers):
        for s in range(students):
            if s == t:
                continue
            row = []
            for b in range(batch):
                total = sum(math.exp(float(student[s, b, k]) / temperature) for k in range(prototypes))
                log_q = [float(student[s, b, k]) / temperature - math.log(total) for k in range(prototypes)]
                row.append(-sum(float(targets[t, b, k]) * log_q[k] for k in range(prototypes)))
            expected.append(row)
    assert len(expected) == teachers * students - min(teachers, students)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_entropy__uniform_and_certain() -> None:
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(math.log(8))
    assert float(entropy(torch.eye(4)[0])) == 0
