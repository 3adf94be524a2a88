"""The Market-1501 protocol against a naive loop, scikit-learn, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from datapipe.core.errors import DataError
from training.reid.retrieval import (
    RetrievalResult,
    confident_mistakes,
    evaluate,
    evaluate_distances,
    per_camera,
)

Case = tuple[NDArray, NDArray, NDArray, NDArray, NDArray, NDArray]


def random_case(seed: int, *, queries: int = 40, gallery: int = 170, levels: int = 0, distractors: int = 20) -> Case:
    """Features and labels; `levels` > 0 makes coarse features with many ties; some junk, one lonely query."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((queries + gallery, 16)).astype(np.float32)
    if levels:
        features = np.sign(features[:, :levels])
    pids = random.integers(1, 12, queries + gallery)
    pids[queries : queries + distractors] = 0
    pids[queries + distractors : queries + distractors + 5] = -1
    pids[3] = 999
    cameras = random.integers(0, 3, queries + gallery)
    return (
        features[:queries],
        features[queries:],
        pids[:queries],
        pids[queries:],
        cameras[:queries],
        cameras[queries:],
    )


def distances_of(case: Case) -> NDArray:
    """Squared Euclidean distances between normalised features, in float64, as a full matrix."""
    query, gallery = (part.astype(np.float64) for part in case[:2])
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    return ((query[:, None] - gallery[None]) ** 2).sum(-1)


def naive(distances: NDArray, case: Case, ranks: int = 50) -> tuple[NDArray, list[float], list[float], list[int]]:
    """The protocol read aloud: (cmc, AP, INP, scored queries)."""
    _, _, q_pids, g_pids, q_cams, g_cams = case
    curves, precisions, penalties, scored = [], [], [], []
    for query in range(len(distances)):
        ranking = sorted(range(len(g_pids)), key=lambda row: (distances[query][row], row))
        ranking = [row for row in ranking if g_pids[row] != -1]
        ranking = [row for row in ranking if (g_pids[row], g_cams[row]) != (q_pids[query], q_cams[query])]
        hits = [g_pids[row] == q_pids[query] for row in ranking]
        if not any(hits):
            continue
        scored.append(query)
        places = [place for place, hit in enumerate(hits, start=1) if hit]
        precisions.append(float(np.mean([count / place for count, place in enumerate(places, start=1)])))
        penalties.append(len(places) / places[-1])
        curves.append([any(hits[:rank]) for rank in range(1, ranks + 1)])
    return np.mean(curves, axis=0), precisions, penalties, scored


def assert_equals_naive(result: RetrievalResult, distances: NDArray, case: Case) -> None:
    cmc, precisions, penalties, scored = naive(distances, case)
    np.testing.assert_array_equal(result.queries, scored)
    np.testing.assert_allclose(result.average_precision, precisions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.inverse_negative_penalty, penalties, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-12)
    assert result.mAP == pytest.approx(np.mean(precisions), abs=1e-12)
    assert result.mINP == pytest.approx(np.mean(penalties), abs=1e-12)
    assert result.skipped == len(distances) - len(scored) >= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evaluate__equals_the_naive_loop(seed: int) -> None:
    case = random_case(seed)
    assert_equals_naive(evaluate(*case), distances_of(case), case)


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluate_distances__ties_keep_the_order_of_the_gallery(seed: int) -> None:
    case = random_case(seed)
    distances = np.round(distances_of(case), 1)  # about twenty different values
    assert_equals_naive(evaluate_distances(distances, *case[2:]), distances, case)


def test_evaluate__equal_features_keep_the_order_of_the_gallery() -> None:
    case = random_case(5, levels=4)
    cosines = case[0] @ case[1].T  # products of signs: exact
    assert_equals_naive(evaluate(*case), -cosines, case)


def test_evaluate__does_not_depend_on_chunks_and_threads() -> None:
    case = random_case(1)
    whole = evaluate(*case, top_k=7)
    for chunk_mb, threads in ((1e-6, 1), (0.003, 3)):
        other = evaluate(*case, top_k=7, chunk_mb=chunk_mb, threads=threads)
        assert other.mAP == pytest.approx(whole.mAP, abs=1e-12)
        np.testing.assert_array_equal(other.nearest, whole.nearest)


def test_average_precision__equals_scikit_learn_without_ties() -> None:
    case = random_case(7)
    _, _, q_pids, g_pids, q_cams, g_cams = case
    distances, result = distances_of(case), evaluate(*case)
    for position, query in enumerate(result.queries):
        kept = (g_pids != -1) & ~((g_pids == q_pids[query]) & (g_cams == q_cams[query]))
        expected = average_precision_score(g_pids[kept] == q_pids[query], -distances[query][kept])
        assert result.average_precision[position] == pytest.approx(expected, abs=1e-12)


def test_evaluate__four_images_by_hand() -> None:
    angles = np.radians([0, 5, 10, 20, 30])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # nearest to the query: same camera (left out), a distractor, a match, a match
    labels = (np.array([7]), np.array([7, 0, 7, 7]), np.array([0]), np.array([0, 2, 1, 2]))
    result = evaluate(features[:1], features[1:], *labels, top_k=5)
    assert result.average_precision.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2])
    assert result.mINP == pytest.approx(2 / 3)
    assert result.cmc[:3].tolist() == [0, 1, 1]
    assert result.first_match.tolist() == [2]
    assert result.nearest.tolist() == [[1, 2, 3, -1, -1]]


def test_nearest__is_the_ranking_that_was_scored() -> None:
    case = random_case(3, levels=5)
    _, _, q_pids, g_pids, q_cams, g_cams = case
    result = evaluate(*case, top_k=len(g_pids))
    for position, query in enumerate(result.queries):
        ranking = result.nearest[query][result.nearest[query] >= 0]
        assert not ((g_pids[ranking] == q_pids[query]) & (g_cams[ranking] == q_cams[query])).any()
        places = np.flatnonzero(g_pids[ranking] == q_pids[query]) + 1
        precision = np.mean(np.arange(1, len(places) + 1) / places)
        assert precision == pytest.approx(result.average_precision[position], abs=1e-12)


def test_evaluate__half_precision_features_are_ranked_in_float32() -> None:
    case = random_case(2)
    half = tuple(part.astype(np.float16) for part in case[:2])
    raised = tuple(part.astype(np.float32) for part in half)
    assert evaluate(*half, *case[2:]).mAP == evaluate(*raised, *case[2:]).mAP


def test_evaluate__leaves_its_inputs_alone() -> None:
    case = random_case(0)
    distances = distances_of(case)
    before = distances.copy()
    evaluate_distances(distances, *case[2:])
    np.testing.assert_array_equal(distances, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_evaluate__refuses_features_that_are_not_finite(value: float) -> None:
    case = random_case(0)
    case[1][17, 3] = value
    with pytest.raises(DataError, match="1 of 170 gallery features are not finite .*row 17"):
        evaluate(*case)


def test_evaluate__refuses_what_does_not_fit() -> None:
    query, gallery, *labels = random_case(0)
    with pytest.raises(DataError, match="16 channels, gallery features 15"):
        evaluate(query, gallery[:, :15], *labels)
    with pytest.raises(DataError, match="169 features for 170 labels"):
        evaluate(query, gallery[:-1], *labels)
    with pytest.raises(DataError, match="none of the 40 queries"):
        evaluate(query, gallery, labels[0] + 5_000, *labels[1:])
    with pytest.raises(DataError, match="NaN"):
        evaluate_distances(np.full((40, 170), np.nan), *labels)


def test_trapezoid__equals_the_official_loop() -> None:
    """Recall and precision after every image of the ranking, trapezoids between them."""
    case = random_case(4)
    distances, result = distances_of(case), evaluate(*case)
    for position, query in enumerate(result.queries):
        area, recall_before, precision_before = 0.0, 0.0, 1.0
        hits = hits_of(distances, case, int(query))
        for place, found in enumerate(np.cumsum(hits), start=1):
            recall, precision = found / sum(hits), found / place
            area += (recall - recall_before) * (precision_before + precision) / 2
            recall_before, precision_before = recall, precision
        assert result.trapezoid_precision[position] == pytest.approx(area, abs=1e-12)
    assert result.trapezoid_mAP == result.trapezoid_precision.mean() < result.mAP


def hits_of(distances: NDArray, case: Case, query: int) -> list[bool]:
    """Whether each image of the query's ranking shows its person."""
    _, _, q_pids, g_pids, q_cams, g_cams = case
    ranking = sorted(range(len(g_pids)), key=lambda row: (distances[query][row], row))
    own = (q_pids[query], q_cams[query])
    kept = [row for row in ranking if g_pids[row] != -1 and (g_pids[row], g_cams[row]) != own]
    return [bool(g_pids[row] == q_pids[query]) for row in kept]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_evaluate_distances__equals_sorting_on_any_small_case(data: st.DataObject) -> None:
    """Few different distances, identities and cameras: ties, junk, distractors and lonely queries everywhere."""
    queries, gallery = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 150))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    distances = random.integers(0, data.draw(st.integers(1, 40)), (queries, gallery)).astype(np.float32)
    q_pids, g_pids = random.integers(0, 4, queries), random.integers(-1, 4, gallery)
    q_cams, g_cams = random.integers(0, 2, queries), random.integers(0, 2, gallery)
    case = (distances, distances, q_pids, g_pids, q_cams, g_cams)
    hits = [hits_of(distances, case, query) for query in range(queries)]
    scored = [query for query in range(queries) if any(hits[query])]
    if not scored:
        with pytest.raises(DataError, match="none of the"):
            evaluate_distances(distances, *case[2:])
        return
    result = evaluate_distances(distances, *case[2:], top_k=gallery, threads=data.draw(st.integers(1, 3)))
    assert result.queries.tolist() == scored and result.skipped == queries - len(scored)
    for position, query in enumerate(scored):
        places = np.flatnonzero(hits[query]) + 1
        precision = np.mean(np.arange(1, len(places) + 1) / places)
        assert result.average_precision[position] == pytest.approx(precision, abs=1e-12)
        assert result.first_match[position] == places[0]
        shown = result.nearest[query][result.nearest[query] >= 0]
        assert (g_pids[shown] == q_pids[query]).tolist() == hits[query]
        assert result.nearest_distances[query][: len(shown)].tolist() == distances[query][shown].tolist()


def test_per_camera__means_of_the_cameras_queries() -> None:
    case = random_case(6)
    result = evaluate(*case)
    found = per_camera(result, case[4])
    cameras = case[4][result.queries]
    assert found == {camera: pytest.approx(result.average_precision[cameras == camera].mean()) for camera in (0, 1, 2)}
    assert sum(found[camera] * (cameras == camera).mean() for camera in found) == pytest.approx(result.mAP)


def test_confident_mistakes__nearest_wrong_images_first() -> None:
    case = random_case(8)
    result = evaluate(*case, top_k=3)
    found = confident_mistakes(result, 5)
    nearest = np.sqrt(np.abs(result.nearest_distances[result.queries[found], 0]))
    assert len(found) == 5 and (np.diff(nearest) >= 0).all()
    assert (result.first_match[found] > 1).all()
    query = case[0] / np.linalg.norm(case[0], axis=1, keepdims=True)
    gallery = case[1] / np.linalg.norm(case[1], axis=1, keepdims=True)
    rows = result.queries[found]
    apart = np.linalg.norm(query[rows] - gallery[result.nearest[rows, 0]], axis=1)
    np.testing.assert_allclose(nearest, apart, atol=1e-5)


def test_pairs__are_sampled_from_what_was_ranked() -> None:
    case = random_case(9)
    result, squared = evaluate(*case), distances_of(case)
    _, _, q_pids, g_pids, q_cams, g_cams = case
    same = q_pids[:, None] == g_pids
    kept = g_pids[None] != -1
    matching = squared[same & kept & (q_cams[:, None] != g_cams)]
    np.testing.assert_allclose(np.sort(result.matching), np.sort(matching), atol=1e-5)  # few enough to keep them all
    assert len(result.others) > 20 * len(q_pids)
    others = squared[~same & kept]
    assert np.abs(result.others[::8, None] - others).min(axis=1).max() < 1e-5
    assert result.others.mean() == pytest.approx(others.mean(), abs=0.1)
