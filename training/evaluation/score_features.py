"""Scores of features that are in a file already, whoever made it: by the same metrics, into the same files."""

from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.core.progress import counted
from datapipe.storage import open_store, split_url, unsafe
from training.evaluation import evaluation
from training.evaluation.feature_file import FEATURE, FoundFeatures, read_features
from training.reid import zero_shot
from training.reid.datasets.open_dataset import ReIDSet
from training.reid.settings import ScoringConfig
from training.reid.zero_shot import Weights

SETTINGS = ("size", "interpolation", "mean", "std", "precision")
"""What of a file's own statement an evaluation of weights says, too."""
ORIGIN = ("name", "address", "step", "samples")
"""What a file says of weights beside their origin."""


def score_features(
    file: str, data: str, out: str, storage: StorageConfig, scoring: ScoringConfig
) -> tuple[dict[str, Any], str]:
    """(metrics, a line about rows that are of other images) of a file of features on a labelled data set; everything is
    written below `out` as for weights.

    The weights are called as the file says, or as it is called. Raises DataError as `open_data` and `read_features`.
    """
    reid = evaluation.open_data(data, storage, scoring)
    paths = [*reid.query.paths.tolist(), *reid.gallery.paths.tolist()]
    found = read_features(file, storage, keys=reid.images.keys(paths), names=paths)
    scored = _scored(found, _weights(found, file), reid, scoring)
    scored.settings.update(_settings(found, file))
    zero_shot.save(scored, reid, open_store(out, storage))
    extra = f"{counted(found.extra, 'row')} of other images, not looked at" if found.extra else ""
    return zero_shot.metrics(scored, reid), extra


def _scored(found: FoundFeatures, weights: Weights, reid: ReIDSet, scoring: ScoringConfig) -> zero_shot.Evaluation:
    name, queries = str(found.header.get("feature") or FEATURE), len(reid.query)
    query, gallery = {name: found.values[:queries]}, {name: found.values[queries:]}
    return zero_shot.evaluate_features(query, gallery, reid, weights, scoring=scoring)


def _weights(found: FoundFeatures, file: str) -> Weights:
    """What the scores are called: as the file says, if that can be a folder, else as the file is called."""
    origin = found.header.get("weights", {})
    name = origin.get("name", "")
    if unsafe(name) or "/" in name:
        name = split_url(file)[1].rpartition(".")[0] or split_url(file)[1]
    return Weights(name, origin.get("step"), origin.get("samples"))


def _settings(found: FoundFeatures, file: str) -> dict[str, Any]:
    """What the file is, and what it says of the features; nothing of a origin where it says none."""
    said = {key: found.header[key] for key in SETTINGS if key in found.header}
    origin = {key: value for key, value in found.header.get("weights", {}).items() if key not in ORIGIN}
    about = {"features": file, "rows": found.rows, "dtype": found.header.get("dtype", "")}
    return about | said | ({"model": origin} if "size" in said and "sha256" in origin else {})
