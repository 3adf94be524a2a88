import math

import pytest
import torch

from training.nn.feature_diagnostics import information, of_features, participation


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


def test_information__equals_the_mutual_information_and_leaves_padding_out() -> None:
    targets = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    weight = torch.tensor([0.2] * 5 + [0.0] * 2, dtype=torch.float64)
    rows = [targets[:, image].mean(dim=0).tolist() for image in range(5)]
    mean = [sum(row[k] for row in rows) / 5 for k in range(5)]
    wanted = [sum(p * math.log(p / mean[k]) for k, p in enumerate(row)) for row in rows]
    assert information(targets, weight).tolist() == pytest.approx([*wanted, 0.0, 0.0])


@pytest.mark.parametrize(("rows", "wanted"), [
    (torch.eye(4), math.log(4)),  # each image has a prototype of its own
    (torch.eye(4)[:1].expand(4, -1), 0.0),  # all images have the same one
    (torch.full((4, 4), 0.25), 0.0),  # all prototypes are used alike
], ids=["own", "same", "uniform"])  # fmt: skip
def test_information__of_healthy_and_of_both_kinds_of_collapsed_targets(rows: torch.Tensor, wanted: float) -> None:
    found = information(rows[None], torch.full((4,), 0.25))
    assert found.tolist() == pytest.approx([wanted] * 4, abs=1e-6)
    assert information(rows[None], torch.zeros(4)).tolist() == [0.0] * 4


def test_features__are_counted_without_padding() -> None:
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [9.0, 9.0]])
    found = of_features(features, torch.tensor([0.25] * 4 + [0.0]))
    assert found["images_compared"].tolist() == [4.0] * 5
    assert found["feature_rank"].tolist() == pytest.approx([2.0] * 5)
    assert found["feature_cosine"][:4].tolist() == pytest.approx([-1 / 3] * 4)
