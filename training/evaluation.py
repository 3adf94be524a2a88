"""Scores of a run's weights: the random ones it began with, every checkpoint it kept, and the colour histogram."""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from datapipe.config import StorageConfig
from datapipe.errors import DataError, NotFoundError
from datapipe.storage import open_store
from training import checkpoint
from training import config as recipes
from training import weights as exports
from training.assembly import build_method, saved_config
from training.backbone import VisionTransformer
from training.config import RunConfig
from training.methods.base import Method
from training.placing import MEAN_STD
from training.reid import zero_shot
from training.reid.datasets import ReIDSet, check_images, open_reid
from training.reid.embed import EmbedConfig
from training.reid.scoring import ScoringConfig
from training.reid.zero_shot import COLOUR_HISTOGRAM, RANDOM, Weights
from training.run_folder import RunFolder
from training.weights import Provenance, load_counted


@dataclass(frozen=True)
class Task:
    """One set of weights to score on one test set. Picklable."""

    run: str
    data: str
    weights: Weights
    storage: StorageConfig
    scoring: ScoringConfig = ScoringConfig()


def open_data(url: str, storage: StorageConfig, scoring: ScoringConfig, *, images: bool = True) -> ReIDSet:
    """A test set as the settings say what it is, its images compared too; raises as `open_reid` and `check_images`."""
    found = open_reid(url, storage, name=scoring.data_name, allow_partial=scoring.allow_partial)
    return check_images(found, allow_partial=scoring.allow_partial) if images else found


def open_run(url: str, storage: StorageConfig) -> tuple[RunFolder, RunConfig]:
    """A run folder and its resolved recipe. Raises DataError where there is none."""
    folder = RunFolder(url, storage)
    config = saved_config(folder)
    if config is None:
        raise DataError("this is no run folder: it has no config.toml", where=url,
                        hint="give the run's --out, or the folder of an export or import")  # fmt: skip
    return folder, config


def tasks(
    run: str, data: str, storage: StorageConfig, scoring: ScoringConfig = ScoringConfig()  # noqa: B008  (frozen)
) -> list[Task]:
    """What there is to score: colour histogram, random weights, and the complete checkpoints, oldest first.

    The test set is checked first, its images too: see `check_images`.
    """
    folder, _ = open_run(run, storage)
    store = folder.at("checkpoints")
    names = checkpoint.complete(store)
    if not names:
        raise DataError("the run has no complete checkpoint", where=store.url, hint="let it reach its first save")
    open_data(data, storage, scoring)
    markers = [(name, checkpoint.read_marker(store, name)) for name in names]
    weights = [Weights(COLOUR_HISTOGRAM), Weights(RANDOM, 0, 0)]
    weights += [Weights(name, marker.step, marker.samples) for name, marker in markers]
    return [Task(run, data, chosen, storage, scoring) for chosen in weights]


def score(task: Task, *, threads: int = 2, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Score one task and write its folder below `evaluation/`; what is there already and of the same weights stays."""
    folder, config = open_run(task.run, task.storage)
    reid = open_data(task.data, task.storage, task.scoring, images=task.scoring.allow_partial)  # `tasks` has refused
    identity = _identity(task, reid, folder, config)
    before = _scored(folder, reid, task.weights, identity)
    if before is not None:
        return before
    if task.weights.name == COLOUR_HISTOGRAM:
        evaluation = zero_shot.evaluate_histogram(reid, scoring=task.scoring)
    else:
        backbone = load_backbone(task.weights, folder, config).to(device)
        mean, std = MEAN_STD[config.views.statistics]
        how = EmbedConfig(threads=threads, mean=mean, std=std, interpolation=config.evaluation.interpolation)
        evaluation = zero_shot.evaluate_backbone(
            backbone, reid, task.weights, size=config.backbone.size, device=device, config=how,
            headline=feature_of(config.method.name, backbone.parts), scoring=task.scoring,
        )  # fmt: skip
    evaluation = replace(evaluation, settings=evaluation.settings | {"identity": identity})
    zero_shot.save(evaluation, reid, folder.store)
    return zero_shot.metrics(evaluation, reid)


def score_export(
    url: str, data: str, storage: StorageConfig, *, out: str = "", threads: int = 2,
    scoring: ScoringConfig = ScoringConfig(),  # noqa: B008  (frozen)
) -> dict[str, Any]:  # fmt: skip
    """Score the weights of an export or import, at the size and with the statistics on its card; write `evaluation/`
    below `out`, or beside them."""
    store = open_store(url, storage)
    card = exports.load_card(store)
    reid = open_data(data, storage, scoring)
    config = EmbedConfig(threads=threads, mean=tuple(card["input"]["mean"]), std=tuple(card["input"]["std"]))
    backbone = exports.load_backbone(store)
    weights = Weights("exported", card.get("step"), card.get("samples"))
    evaluation = zero_shot.evaluate_backbone(
        backbone, reid, weights, size=backbone.config.size, config=config,
        headline=feature_of(_method_of(card), backbone.parts), scoring=scoring,
    )  # fmt: skip
    zero_shot.save(evaluation, reid, open_store(out, storage) if out else store)
    return zero_shot.metrics(evaluation, reid)


def load_backbone(weights: Weights, folder: RunFolder, config: RunConfig) -> VisionTransformer:
    """The backbone that is evaluated, in eval mode: of the fresh method, or of a checkpoint (verified)."""
    return load_method(weights, folder, config).backbone().eval()


def load_method(weights: Weights, folder: RunFolder, config: RunConfig) -> Method:
    """The same with the whole method, on the CPU."""
    method = build_method(config)
    if weights.name != RANDOM:
        store = folder.at("checkpoints")
        _, state = checkpoint.read_state(store, weights.name)
        load_counted(method, checkpoint.model_tensors(state), where=store.address(weights.name))
    return method


def feature_of(method: str, parts: int) -> str:
    """The feature that is quoted: what fine-tuning ranked by, where there was one; else that of CLS."""
    return "cls+parts" if method == "supervised" and parts else "cls"


def _method_of(card: dict[str, Any]) -> str:
    """What the weights on a card were trained by; others' fine-tuned ones are supervised too."""
    layout = str(card.get("origin", {}).get("layout", ""))
    return "supervised" if layout.endswith("fine_tuned") else str(card.get("method", ""))


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The scores of the feature that is quoted, of the content of a metrics.json."""
    found: dict[str, float] = metrics["features"][metrics["headline"]]
    return found


def provenance(weights: Weights, folder: RunFolder, config: RunConfig) -> Provenance:
    """What the card of exported weights of a run says of them."""
    marker = checkpoint.read_marker(folder.at("checkpoints"), weights.name)
    mean, std = MEAN_STD[config.views.statistics]
    return Provenance(
        method=config.method.name, recipe=recipes.to_tree(config), manifest=marker.manifest, licence=licence_of(folder),
        samples=marker.samples, step=marker.step, origin=marker.origin, mean=mean, std=std,
    )  # fmt: skip


def licence_of(folder: RunFolder) -> str:
    """The licence of the data a run was trained on, as its environment.json has it; empty if unknown."""
    text = folder.read_text("environment.json")
    return json.loads(text)["manifest"]["licence"] if text else ""


def _identity(task: Task, reid: ReIDSet, folder: RunFolder, config: RunConfig) -> str:
    """What must be equal for old scores to stand."""
    data = f"{task.data} {reid.about()['counts']} {task.scoring}"
    if task.weights.name == COLOUR_HISTOGRAM:
        return data
    if task.weights.name == RANDOM:
        return f"{data} seed {config.seed} {config.backbone}"
    return f"{data} {checkpoint.read_marker(folder.at('checkpoints'), task.weights.name).sha256}"


def _scored(folder: RunFolder, reid: ReIDSet, weights: Weights, identity: str) -> dict[str, Any] | None:
    try:
        before = json.loads(folder.store.read(f"evaluation/{reid.name}/{weights.name}/metrics.json"))
    except NotFoundError:
        return None
    return before if before.get("settings", {}).get("identity") == identity else None


def table(scores: list[dict[str, Any]]) -> str:
    """The scores as lines of a plain table, in percent."""
    names = [name for row in scores for name in row["features"]]
    width = max(map(len, [*names, "feature"])) + 2
    lines = [f"{'weights':<20}{'samples':>12}  {'feature':<{width}}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}{'mINP':>7}"]
    for row in scores:
        for name, found in row["features"].items():
            samples = "" if row["samples"] is None else f"{row['samples']:,}"
            numbers = "".join(f"{100 * found[key]:7.1f}" for key in ("mAP", "rank1", "rank5", "rank10", "mINP"))
            trapezoid = f"  trapezoid mAP {100 * found['trapezoid_mAP']:.1f}" if "trapezoid_mAP" in found else ""
            lines.append(f"{row['weights']:<20}{samples:>12}  {name:<{width}}{numbers}{trapezoid}")
    return "\n".join(lines)
