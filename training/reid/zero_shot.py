"""Score a backbone, or any features, by retrieval without fine-tuning, and keep what a person wants to see.

Written per set and weights: ranked_best.jpg, ranked_median.jpg, ranked_worst.jpg, ranked_mistake_1.jpg ..., queries.csv
and, last of all, metrics.json. The pictures show the very rankings that were scored.
"""

import csv
import io
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from datapipe.core.config import Size
from datapipe.core.errors import DataError
from datapipe.core.progress import QUIET_S, Progress
from datapipe.storage import Store
from training.nn.identity.necks import FEATURE
from training.reid.colour_histogram import colour_histogram
from training.reid.datasets.open_dataset import Labelled, ReIDSet
from training.reid.embed import EmbedConfig, Embedder, Features, decode, embed
from training.reid.ranked_lists import Picture, Tile, ranked_list, to_jpeg
from training.reid.retrieval import RetrievalResult, confident_mistakes, evaluate, per_camera
from training.reid.settings import ScoringConfig

SHOWN = 10
"""Gallery images in a ranked list."""
MISTAKES = 3
"""Queries whose nearest image is most surely taken for the same person, and is not."""
BINS = 50
"""Bins of the histograms of distances."""

COLOUR_HISTOGRAM = "colour_histogram"
"""A baseline in place of weights: the colours of the image. The other is RANDOM."""


@dataclass(frozen=True)
class Weights:
    """What is scored: "random", "colour_histogram", "step_0000100", ..., and how far it was trained."""

    name: str
    step: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of weights on one test set."""

    set_name: str
    weights: Weights
    results: dict[str, RetrievalResult]
    """By feature."""
    headline: str
    """The feature that is quoted where there is room for one number, and shown in the pictures."""
    seconds: float
    settings: dict[str, Any]
    """What the scores depend on besides weights and data."""
    scoring: ScoringConfig = ScoringConfig()

    @property
    def best(self) -> RetrievalResult:
        """The result of the headline feature."""
        return self.results[self.headline]


def evaluate_backbone(
    backbone: Embedder,
    reid: ReIDSet,
    weights: Weights,
    *,
    size: Size,
    device: torch.device | str = "cpu",
    config: EmbedConfig | None = None,
    headline: str = "",
    scoring: ScoringConfig | None = None,
) -> Evaluation:
    """Embed query and gallery at `size` (height, width) and score every feature; errors as `embed` and `evaluate`."""
    config = config or EmbedConfig()
    started = time.perf_counter()
    query, gallery = (
        embed(backbone, part.paths.tolist(), reid.read, size=size, device=device, config=config,
              label=f"{weights.name}: embed {name}")
        for name, part in (("query", reid.query), ("gallery", reid.gallery))
    )  # fmt: skip
    scored = evaluate_features(query, gallery, reid, weights, headline=headline, scoring=scoring)
    used = {
        "size": list(size),
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "std": list(config.std),
        "precision": config.precision,
    }
    return replace(scored, seconds=time.perf_counter() - started, settings=scored.settings | used)


def evaluate_histogram(reid: ReIDSet, *, scoring: ScoringConfig | None = None) -> Evaluation:
    """The colour histogram's score: what colours alone can do on this set."""
    started = time.perf_counter()
    query, gallery = (_histograms(reid, name) for name in ("query", "gallery"))
    scored = evaluate_features(query, gallery, reid, Weights(COLOUR_HISTOGRAM), scoring=scoring)
    return replace(scored, seconds=time.perf_counter() - started)


def _histograms(reid: ReIDSet, name: str) -> Features:
    paths = reid.parts[name].paths.tolist()
    with Progress(f"{COLOUR_HISTOGRAM}: {name}", len(paths), unit="images", quiet_s=QUIET_S) as progress:
        images = (decode(reid.read(path), path) for path in paths)
        return {"histogram": colour_histogram(progress.over(images, lambda _: 1))}


def evaluate_features(
    query: Features,
    gallery: Features,
    reid: ReIDSet,
    weights: Weights,
    *,
    headline: str = "",
    scoring: ScoringConfig | None = None,
) -> Evaluation:
    """Score features [N, C] by name, re-ranked ones as "NAME re-ranked". The headline is the first or the named one.
    They are normalised before they are ranked, but for "neck", which unsupervised training ranks by as it is."""
    if not query or query.keys() != gallery.keys():
        raise DataError(f"query features are {sorted(query)}, gallery features {sorted(gallery)}: not the same")
    scoring = scoring or ScoringConfig()
    started = time.perf_counter()
    labels = (reid.query.pids, reid.gallery.pids, reid.query.cameras, reid.gallery.cameras)
    ways = {"": None, " re-ranked": scoring.reranking} if scoring.rerank else {"": None}
    results = {
        f"{name}{ending}": evaluate(
            query[name],
            gallery[name],
            *labels,
            normalise=name != FEATURE,
            top_k=SHOWN,
            reranking=reranking,
            label=f"{weights.name}: rank by {name}{ending}",
        )
        for name in query
        for ending, reranking in ways.items()
    }
    seconds = time.perf_counter() - started
    used = {"reranking": asdict(scoring.reranking)} if scoring.rerank else {}
    return Evaluation(reid.name, weights, results, headline or next(iter(results)), seconds, used, scoring)


def save(evaluation: Evaluation, reid: ReIDSet, run: Store) -> Store:
    """Write everything below evaluation/<set>/<weights>/ of a run folder; metrics.json last. Returns that folder."""
    folder = run.at("evaluation", evaluation.set_name, evaluation.weights.name)
    ranked = {}
    for which, query in (chosen_queries(evaluation.best) | _mistakes(evaluation.best)).items():
        picture, ranked[which] = _ranked(evaluation, reid, which, query)
        folder.replace(f"ranked_{which}.jpg", to_jpeg(picture))
    folder.replace("queries.csv", _queries_csv(evaluation.best, reid.query))
    content = {**metrics(evaluation, reid), "ranked": ranked}
    folder.replace("metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    return folder


def metrics(evaluation: Evaluation, reid: ReIDSet) -> dict[str, Any]:
    """The content of metrics.json; scores are fractions (0..1). Cameras and distances are those of the headline."""
    best = evaluation.best
    return {
        "weights": evaluation.weights.name,
        "set": evaluation.set_name,
        "step": evaluation.weights.step,
        "samples": evaluation.weights.samples,
        "features": {name: _scores(result, evaluation.scoring) for name, result in evaluation.results.items()},
        "headline": evaluation.headline,
        "data": reid.about(),
        "per_camera": {f"c{camera + 1}": score for camera, score in per_camera(best, reid.query.cameras).items()},
        "distances": histograms(best),
        "queries": len(reid.query),
        "gallery": len(reid.gallery),
        "skipped": best.skipped,
        "seconds": round(evaluation.seconds, 3),
        "settings": evaluation.settings,
    }


def chosen_queries(result: RetrievalResult) -> dict[str, int]:
    """Positions among the scored queries of the best, the median and the worst average precision."""
    order = np.argsort(-result.average_precision, kind="stable")
    return {"best": int(order[0]), "median": int(order[len(order) // 2]), "worst": int(order[-1])}


def histograms(result: RetrievalResult, bins: int = BINS) -> dict[str, list[float]]:
    """How far pairs of one person and pairs of two people are apart: bin edges, and the share of the pairs in each."""
    edges = np.histogram_bin_edges(np.concatenate([result.matching, result.others]), bins)
    pairs = {"matching": result.matching, "others": result.others}
    shares = {name: np.histogram(distances, edges)[0] / max(1, len(distances)) for name, distances in pairs.items()}
    return {"edges": edges.tolist(), **{name: share.tolist() for name, share in shares.items()}}


def _mistakes(result: RetrievalResult) -> dict[str, int]:
    """The most confident ones, by the names of their pictures."""
    return {f"mistake_{rank}": int(at) for rank, at in enumerate(confident_mistakes(result, MISTAKES), start=1)}


def _scores(result: RetrievalResult, scoring: ScoringConfig) -> dict[str, float]:
    ranks = {f"rank{rank}": float(result.cmc[rank - 1]) for rank in (1, 5, 10)}
    trapezoid = {"trapezoid_mAP": result.trapezoid_mAP} if scoring.trapezoid else {}
    return {"mAP": result.mAP, **ranks, "mINP": result.mINP, **trapezoid}


def _ranked(evaluation: Evaluation, reid: ReIDSet, which: str, position: int) -> tuple[Picture, dict[str, Any]]:
    """The picture of one ranking, and the same in words."""
    result = evaluation.best
    query = int(result.queries[position])
    rows = [int(row) for row in result.nearest[query] if row >= 0]
    correct = [bool(reid.gallery.pids[row] == reid.query.pids[query]) for row in rows]
    precision = float(result.average_precision[position])
    tiles = [
        Tile(_image(reid, reid.gallery, row), right, _caption(reid.gallery, row))
        for row, right in zip(rows, correct, strict=True)
    ]
    of = f"{evaluation.weights.name}, {evaluation.headline}"
    title = f"{which.replace('_', ' ')} query: average precision {100 * precision:.1f} %  ({of})"
    picture = ranked_list(_image(reid, reid.query, query), f"query  {_caption(reid.query, query)}", tiles, title)
    return picture, {
        "query": str(reid.query.paths[query]),
        "average_precision": precision,
        "gallery": [str(reid.gallery.paths[row]) for row in rows],
        "distances": result.nearest_distances[query, : len(rows)].tolist(),
        "correct": correct,
    }


def _image(reid: ReIDSet, part: Labelled, row: int) -> Picture:
    path = str(part.paths[row])
    return decode(reid.read(path), path)


def _caption(part: Labelled, row: int) -> str:
    return f"id {part.pids[row]} c{part.cameras[row] + 1}"


def _queries_csv(result: RetrievalResult, query: Labelled) -> bytes:
    """One line a query of the headline feature; skipped ones have empty scores."""
    scored = {int(row): position for position, row in enumerate(result.queries)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "identity", "camera", "average_precision", "inverse_negative_penalty", "first_match"])
    for row in range(len(query)):
        scores: list[float | int | str] = ["", "", ""]
        if (at := scored.get(row)) is not None:
            per_query = (result.average_precision, result.inverse_negative_penalty, result.first_match)
            scores = [values[at].item() for values in per_query]
        writer.writerow([query.paths[row], query.pids[row], query.cameras[row] + 1, *scores])
    return text.getvalue().encode()
