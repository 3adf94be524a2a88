"""Re-ranked distances and scores equal those of the reference with its float16 storage replaced by float32."""

import numpy as np
from numpy.typing import NDArray

from tests.support.golden import golden, tolerance
from training.reid.reranking import reranked
from training.reid.retrieval import evaluate, evaluate_distances
from training.reid.settings import RerankConfig

LABELS = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")


def test_reranking__equals_the_reference() -> None:
    """The reference as it is keeps intermediate results in float16: ours is within the rounding of that storage."""
    about, tensors = golden("reranking")
    item = {name: tensor.numpy() for name, tensor in tensors.items()}
    chosen = about["hyper_parameters"]
    config = RerankConfig(k1=chosen["k1"], k2=chosen["k2"], weight=chosen["lambda_value"])
    found = distances(item["query_features"], item["gallery_features"], config)
    variant = np.abs(found - item["distance_reranked_float32_variant"]).max()
    assert variant <= tolerance(about, "distance_reranked_float32_variant")
    assert np.abs(found - item["distance_reranked"]).max() <= tolerance(about, "distance_reranked")
    labels = [item[name] for name in LABELS]
    scored = evaluate(item["query_features"], item["gallery_features"], *labels, reranking=config)
    assert abs(scored.mAP - item["mAP_reranked_float32_variant"]) <= tolerance(about, "mAP")
    assert abs(scored.mAP - item["mAP_reranked"]) <= 2e-3
    assert abs(evaluate_distances(found, *labels).mAP - scored.mAP) <= 1e-12
    before = evaluate(item["query_features"], item["gallery_features"], *labels)
    assert abs(before.mAP - item["mAP_before"]) <= tolerance(about, "mAP")
    assert np.abs(scored.cmc - item["cmc_reranked"]).max() <= 1 / len(item["query_pids"])


def distances(query: NDArray, gallery: NDArray, config: RerankConfig) -> NDArray:
    """The whole matrix."""
    features = np.concatenate([query, gallery])
    return np.concatenate([part.copy() for _, part in reranked(features, len(query), config, chunk_mb=0.01, threads=2)])
