"""CMC, mAP, AP per query, INP and skipped queries equal those of the reference evaluation."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.golden import golden, tolerance
from training.reid.retrieval import RetrievalResult, evaluate, evaluate_distances


@pytest.fixture(scope="module")
def item() -> dict[str, NDArray]:
    return {name: tensor.numpy() for name, tensor in golden("retrieval_metrics")[1].items()}


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return golden("retrieval_metrics")[0]


def labels(item: dict[str, NDArray]) -> tuple[NDArray, ...]:
    return item["query_pids"], item["gallery_pids"], item["query_camids"], item["gallery_camids"]


def assert_equal(result: RetrievalResult, item: dict[str, NDArray], card: dict[str, Any]) -> None:
    for ours, name, kind in (
        (result.mAP, "mAP", "mAP"),
        (result.mINP, "mINP", "mINP"),
        (result.cmc, "cmc", "cmc"),
        (result.average_precision, "average_precision", "mAP"),
        (result.inverse_negative_penalty, "inverse_negative_penalty", "mINP"),
    ):
        np.testing.assert_allclose(ours, item[name], rtol=0, atol=tolerance(card, kind), err_msg=name)
    np.testing.assert_array_equal(result.queries, np.flatnonzero(item["query_valid"]))
    assert result.skipped == (~item["query_valid"]).sum()


def test_evaluate_distances__equals_the_reference(item: dict[str, NDArray], card: dict[str, Any]) -> None:
    ranks = card["hyper_parameters"]["max_rank"]
    assert_equal(evaluate_distances(item["distmat"], *labels(item), ranks=ranks), item, card)


def test_evaluate__equals_the_reference_from_features(item: dict[str, NDArray], card: dict[str, Any]) -> None:
    """AP of every query whose matches are no near ties: there, rounding in float32 cannot change the ranking."""
    result = evaluate(item["query_features"], item["gallery_features"], *labels(item))
    clear = np.array([is_clear(item, query) for query in result.queries])
    assert clear.mean() > 0.5
    difference = np.abs(result.average_precision - item["average_precision"])
    assert difference[clear].max() <= tolerance(card, "mAP")
    assert difference.max() < 0.05


def is_clear(item: dict[str, NDArray], query: int) -> bool:
    """No gallery image of another identity is as near as a match, within twice the noise of the distances."""
    matches = item["gallery_pids"] == item["query_pids"][query]
    row = item["distmat"][query].astype(np.float64)
    return bool(np.abs(row[matches][:, None] - row[~matches][None]).min() > 2e-6)
