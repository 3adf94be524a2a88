import pytest
import torch

from training.health import participation


def test_participation__equals_the_ratio_of_the_eigenvalues() -> None:
    features = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(9, dtype=torch.float64)
    weight[6:] = 0
    values = torch.linalg.eigvalsh(torch.cov(features[:6].T))
    wanted = float(values.sum() ** 2 / values.square().sum())
    assert participation(features, weight).tolist() == pytest.approx([wanted] * 9)


def test_participation__one_direction_all_directions_and_none() -> None:
    one = torch.tensor([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])
    assert float(participation(one, torch.ones(3))[0]) == pytest.approx(1.0)
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert float(participation(square, torch.ones(4))[0]) == pytest.approx(2.0)
    assert float(participation(one[:1], torch.ones(1))[0]) == 0.0
    assert float(participation(one, torch.zeros(3))[0]) == 0.0
