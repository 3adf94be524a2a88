"""k-reciprocal re-ranking against the paper read aloud with full matrices, and what it must not depend on."""

import numpy as np
import pytest
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from datapipe.core.progress import lines_sent_to
from training.reid.reranking import reranked
from training.reid.retrieval import evaluate
from training.reid.settings import RerankConfig


def unit(seed: int, images: int = 60, people: int = 12, spread: float = 0.5) -> NDArray:
    """Float64 features in clusters, so that neighbourhoods overlap."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((people, 16))
    features = centres[random.integers(0, people, images)] + spread * random.standard_normal((images, 16))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def naive(features: NDArray, queries: int, config: RerankConfig) -> NDArray:
    """Sets and full matrices, one image after the other."""
    images = len(features)
    squared = 2 - 2 * features @ features.T
    scaled = squared / squared.max(axis=1, keepdims=True)
    ranks = [sorted(range(images), key=lambda other, row=row: (squared[row][other], other)) for row in range(images)]

    def mutual(row: int, k: int) -> set[int]:
        return {other for other in ranks[row][: k + 1] if row in ranks[other][: k + 1]}

    half = round(config.k1 / 2)
    encoded = np.zeros((images, images))
    for row in range(images):
        own = mutual(row, config.k1)
        members = set(own)
        for other in own:
            its = mutual(other, half)
            if len(its & own) > 2 / 3 * len(its):
                members |= its
        weights = {other: np.exp(-scaled[row][other]) for other in members}
        for other, weight in weights.items():
            encoded[row, other] = weight / sum(weights.values())
    if config.k2 > 1:
        encoded = np.stack([encoded[ranks[row][: config.k2]].mean(axis=0) for row in range(images)])
    found = np.empty((queries, images - queries))
    for query in range(queries):
        for place in range(images - queries):
            shared = np.minimum(encoded[query], encoded[queries + place]).sum()
            jaccard = 1 - shared / (2 - shared)
            found[query, place] = (1 - config.weight) * jaccard + config.weight * scaled[query, queries + place]
    return found


def whole(features: NDArray, queries: int, config: RerankConfig, chunk_mb: float = 64, threads: int = 2) -> NDArray:
    chunks = reranked(features, queries, config, chunk_mb=chunk_mb, threads=threads)
    return np.concatenate([part.copy() for _, part in chunks])


@pytest.mark.parametrize(("k1", "k2", "weight", "spread"), [
    (20, 6, 0.3, 0.5), (7, 3, 0.3, 0.2), (5, 1, 0.0, 1.0), (25, 2, 0.5, 0.1), (1, 1, 0.3, 0.5), (200, 100, 0.3, 0.5),
])  # fmt: skip
def test_reranked__equals_the_paper_read_aloud(k1: int, k2: int, weight: float, spread: float) -> None:
    features, config = unit(k1, spread=spread), RerankConfig(k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(whole(features, 10, config), naive(features, 10, config), rtol=0, atol=1e-12)


def test_reranked__does_not_depend_on_chunks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    features = unit(3)
    expected = whole(features, 15, RerankConfig())
    monkeypatch.setattr("training.clustering.k_reciprocal.ROWS", 7)
    for chunk_mb, threads in ((1e-6, 1), (0.003, 3)):
        np.testing.assert_allclose(whole(features, 15, RerankConfig(), chunk_mb, threads), expected, rtol=0, atol=1e-12)


def test_reranked__weight_of_one_keeps_the_order() -> None:
    features = unit(4)
    found = whole(features, 10, RerankConfig(weight=1.0))
    np.testing.assert_array_equal(np.argsort(found), np.argsort(-features[:10] @ features[10:].T))


def test_evaluate__tells_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datapipe.core.progress.INTERVAL_S", 0.0)
    monkeypatch.setattr("datapipe.core.progress.FIRST_S", 0.0)
    features = unit(3)
    pids, cameras = np.arange(60) % 12, np.arange(60) // 12
    parts = (features[:20], features[20:], pids[:20], pids[20:], cameras[:20], cameras[20:])
    lines: list[str] = []
    with lines_sent_to(lines.append):
        evaluate(*parts, reranking=RerankConfig(k1=10, k2=3), chunk_mb=0.002, label="cls")
        evaluate(*parts, chunk_mb=0.002, label="plain")
    stages = ["cls, neighbours", "cls, neighbourhoods", "cls", "plain"]
    assert list(dict.fromkeys(line.partition(":")[0] for line in lines)) == stages
    assert any("20 of 20 queries" in line and "queries/s" in line and "left" in line for line in lines)


def test_evaluate__reranking_helps_in_clusters_and_reports_its_distances() -> None:
    features = unit(6, images=200, people=20, spread=0.9)
    centres = np.random.default_rng(6).standard_normal((20, 16))  # as they were drawn: who is nearest to whom
    labels = (features @ centres.T).argmax(axis=1)
    cameras = np.arange(200) % 2
    parts = (features[:60], features[60:], labels[:60], labels[60:], cameras[:60], cameras[60:])
    before, after = evaluate(*parts, top_k=5), evaluate(*parts, top_k=5, reranking=RerankConfig(k1=10, k2=3))
    assert after.mAP > before.mAP
    assert after.nearest_distances.min() >= 0 and after.nearest_distances.max() <= 1
    with pytest.raises(DataError, match="not finite"):
        evaluate(np.full_like(parts[0], np.nan), *parts[1:], reranking=RerankConfig())
