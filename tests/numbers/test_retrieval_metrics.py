"""CMC, mAP, AP per query, INP and skipped queries equal those of the reference evaluation."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from training.reid.retrieval import RetrievalResult, evaluate, evaluate_distances

FOLDER = Path(os.environ.get("GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden"))


@pytest.fixture(scope="module")
def item() -> dict[str, NDArray]:
    path = FOLDER / "retrieval_metrics.safetensors"
    if not path.is_file():
        pytest.skip("golden vectors are not here")
    return load_file(path)


@pytest.fixture(scope="module")
def card(item: dict[str, NDArray]) -> dict[str, Any]:
    return json.loads((FOLDER / "retrieval_metrics.json").read_text())


def labels(item: dict[str, NDArray]) -> tuple[NDArray, ...]:
    return item["query_pids"], item["gallery_pids"], item["query_camids"], item["gallery_camids"]


def assert_equal(result: RetrievalResult, item: dict[str, NDArray], card: dict[str, Any]) -> None:
    tolerance = {name: float(re.split(" ", text)[0]) for name, text in card["tolerance"].items()}
    assert abs(result.mAP - item["mAP"]) <= tolerance["mAP"]
    assert abs(result.mINP - item["mINP"]) <= tolerance["mINP"]
    np.testing.assert_allclose(result.cmc, item["cmc"], rtol=0, atol=tolerance["cmc"])
    np.testing.assert_allclose(result.average_precision, item["average_precision"], rtol=0, atol=tolerance["mAP"])
    np.testing.assert_allclose(
        result.inverse_negative_penalty, item["inverse_negative_penalty"], rtol=0, atol=tolerance["mINP"]
    )
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
    assert difference[clear].max() <= float(card["tolerance"]["mAP"])
    assert difference.max() < 0.05


def is_clear(item: dict[str, NDArray], query: int) -> bool:
    """No gallery image of another identity is as near as a match, within twice the noise of the distances."""
    matches = item["gallery_pids"] == item["query_pids"][query]
    row = item["distmat"][query].astype(np.float64)
    return bool(np.abs(row[matches][:, None] - row[~matches][None]).min() > 2e-6)
