"""Scores of a backbone and of the colour histogram, the files they leave, and pictures that agree with the numbers."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.errors import DataError
from datapipe.storage import Store, open_store
from tests.training.reid.people import market
from tests.training.reid.test_embed import Means
from training.reid.datasets.open_dataset import ReIDSet, open_reid
from training.reid.embed import decode, feature_widths
from training.reid.settings import RerankConfig, ScoringConfig
from training.reid.zero_shot import (
    Evaluation,
    Weights,
    chosen_queries,
    evaluate_backbone,
    evaluate_features,
    evaluate_histogram,
    metrics,
    save,
)


@pytest.fixture(scope="module")
def reid(tmp_path_factory: pytest.TempPathFactory) -> ReIDSet:
    return open_reid(str(market(tmp_path_factory.mktemp("data") / "people")))


@pytest.fixture(scope="module")
def scored(reid: ReIDSet) -> Evaluation:
    return evaluate_backbone(Means(), reid, Weights("step_0000100", step=100, samples=6_400), size=(32, 16))


@pytest.fixture(scope="module")
def folder(reid: ReIDSet, scored: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return save(scored, reid, open_store(str(tmp_path_factory.mktemp("run"))))


def test_evaluate_backbone__scores_every_feature(scored: Evaluation) -> None:
    assert list(scored.results) == list(feature_widths(3, 2)) and scored.headline == "cls"
    assert scored.results["cls+parts"].mAP > 0.5  # colours tell these people apart
    assert scored.seconds > 0


def test_evaluate_features__random_features_are_worse(reid: ReIDSet, scored: Evaluation) -> None:
    random = np.random.default_rng(0)
    query, gallery = (
        {"noise": random.standard_normal((len(part), 8)).astype(np.float32)} for part in (reid.query, reid.gallery)
    )
    noise = evaluate_features(query, gallery, reid, Weights("random"))
    assert noise.best.mAP < scored.best.mAP
    with pytest.raises(DataError, match="not the same"):
        evaluate_features(query, {"other": gallery["noise"]}, reid, Weights("random"))


def test_evaluate_histogram__is_named_and_scored(reid: ReIDSet) -> None:
    found = evaluate_histogram(reid)
    assert found.weights.name == "colour_histogram" and found.weights.step is None
    assert found.best.mAP > 0.5


def test_metrics_json__has_the_agreed_keys(folder: Store, scored: Evaluation, reid: ReIDSet) -> None:
    content = json.loads(folder.read("metrics.json"))
    assert folder.url.endswith("evaluation/people/step_0000100")
    assert {name: content[name] for name in ("weights", "set", "step", "samples", "headline")} == {
        "weights": "step_0000100",
        "set": "people",
        "step": 100,
        "samples": 6_400,
        "headline": "cls",
    }
    assert (content["queries"], content["gallery"], content["skipped"]) == (18, 37, 0)
    assert set(content["features"]["mean"]) == {"mAP", "rank1", "rank5", "rank10", "mINP"}
    assert content["features"]["cls"]["mAP"] == scored.best.mAP  # reads back exactly
    assert content["features"] == metrics(scored, reid)["features"]


def test_ranked_lists__agree_with_the_numbers(folder: Store, scored: Evaluation, reid: ReIDSet) -> None:
    """The list in the picture is the ranking that was scored: recomputed here from the shown order alone."""
    ranked = json.loads(folder.read("metrics.json"))["ranked"]
    queries, gallery = reid.query.paths.tolist(), reid.gallery.paths.tolist()
    for which, position in chosen_queries(scored.best).items():
        shown = ranked[which]
        query = queries.index(shown["query"])
        assert query == scored.best.queries[position]
        rows = [gallery.index(path) for path in shown["gallery"]]
        assert rows == scored.best.nearest[query].tolist()
        assert shown["correct"] == (reid.gallery.pids[rows] == reid.query.pids[query]).tolist()
        first = shown["correct"].index(True) + 1 if True in shown["correct"] else 11
        assert min(scored.best.first_match[position], 11) == first
        same_camera = reid.gallery.cameras[rows] == reid.query.cameras[query]
        assert not (same_camera & shown["correct"]).any()
        assert decode(folder.read(f"ranked_{which}.jpg")).shape[1] > 11 * 96
    precisions = [ranked[which]["average_precision"] for which in ("best", "median", "worst")]
    assert precisions == sorted(precisions, reverse=True)
    assert precisions[0] == scored.best.average_precision.max()
    assert precisions[2] == scored.best.average_precision.min()


def test_queries_csv__means_are_the_scores(folder: Store, scored: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(folder.read("queries.csv").decode())))
    assert len(rows) == 18 and rows[0]["query"] == "query/0001_c1s1_000000_00.jpg"
    assert np.mean([float(row["average_precision"]) for row in rows]) == pytest.approx(scored.best.mAP, abs=1e-15)
    assert np.mean([row["first_match"] == "1" for row in rows]) == scored.best.cmc[0]


def test_save__counts_skipped_queries(tmp_path: Path) -> None:
    root = market(tmp_path / "people", identities=3)
    (root / "query" / "0077_c1s1_000000_00.jpg").write_bytes((root / "query" / "0001_c1s1_000000_00.jpg").read_bytes())
    reid = open_reid(str(root))
    folder = save(evaluate_histogram(reid), reid, open_store(str(tmp_path / "run")))
    assert json.loads(folder.read("metrics.json"))["skipped"] == 1
    assert list(csv.DictReader(io.StringIO(folder.read("queries.csv").decode())))[-1]["average_precision"] == ""


def test_metrics__say_what_the_data_are_and_how_cameras_and_distances_differ(
    folder: Store, scored: Evaluation, reid: ReIDSet
) -> None:
    content = json.loads(folder.read("metrics.json"))
    assert content["data"] == reid.about() and content["data"]["counts"]["query"]["images"] == 18
    precision = {camera: scored.best.average_precision[reid.query.cameras == camera - 1].mean() for camera in (1, 2, 3)}
    assert content["per_camera"] == {f"c{camera}": pytest.approx(mean) for camera, mean in precision.items()}
    found = content["distances"]
    middles = (np.array(found["edges"][1:]) + found["edges"][:-1]) / 2
    assert len(found["matching"]) == len(found["others"]) == len(middles) == 50
    assert sum(found["matching"]) == pytest.approx(1) and sum(found["others"]) == pytest.approx(1)
    assert middles @ found["matching"] < middles @ found["others"]


def test_mistakes__are_shown_most_confident_first(reid: ReIDSet, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    query, gallery = (
        {"noise": random.standard_normal((len(part), 4)).astype(np.float32)} for part in (reid.query, reid.gallery)
    )
    noise = evaluate_features(query, gallery, reid, Weights("random"))
    ranked = json.loads(save(noise, reid, open_store(str(tmp_path))).read("metrics.json"))["ranked"]
    mistakes = [ranked[f"mistake_{rank}"] for rank in (1, 2, 3)]
    first = [mistake["distances"][0] for mistake in mistakes]
    assert first == sorted(first) and not any(mistake["correct"][0] for mistake in mistakes)
    rows = noise.best.nearest[:, 0]
    wrong = reid.gallery.pids[rows] != reid.query.pids
    assert first[0] == noise.best.nearest_distances[wrong, 0].min()


def test_scoring__re_ranked_and_trapezoid_scores_by_name(reid: ReIDSet) -> None:
    scoring = ScoringConfig(rerank=True, reranking=RerankConfig(k1=5, k2=2), trapezoid=True)
    found = evaluate_backbone(Means(), reid, Weights("w"), size=(32, 16), scoring=scoring)
    assert list(found.results)[:2] == ["cls", "cls re-ranked"] and found.headline == "cls"
    content = metrics(found, reid)
    assert content["settings"]["reranking"] == {"k1": 5, "k2": 2, "weight": 0.3}
    assert content["features"]["cls"]["trapezoid_mAP"] == found.best.trapezoid_mAP < found.best.mAP
    assert found.results["cls re-ranked"].mAP != found.best.mAP
