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
from training.reid.datasets import ReIDSet, open_reid
from training.reid.embed import EmbedConfig
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


def open_run(url: str, storage: StorageConfig) -> tuple[RunFolder, RunConfig]:
    """A run folder and its resolved recipe. Raises DataError where there is none."""
    folder = RunFolder(url, storage)
    config = saved_config(folder)
    if config is None:
        raise DataError("this is no run folder: it has no config.toml", where=url,
                        hint="give the run's --out, or the folder of an export or import")  # fmt: skip
    return folder, config


def tasks(run: str, data: str, storage: StorageConfig) -> list[Task]:
    """What there is to score: colour histogram, random weights, and the complete checkpoints, oldest first."""
    folder, _ = open_run(run, storage)
    store = folder.at("checkpoints")
    names = checkpoint.complete(store)
    if not names:
        raise DataError("the run has no complete checkpoint", where=store.url, hint="let it reach its first save")
    markers = [(name, checkpoint.read_marker(store, name)) for name in names]
    weights = [Weights(COLOUR_HISTOGRAM), Weights(RANDOM, 0, 0)]
    weights += [Weights(name, marker.step, marker.samples) for name, marker in markers]
    return [Task(run, data, chosen, storage) for chosen in weights]


def score(task: Task, *, threads: int = 2, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Score one task and write its folder below `evaluation/`; what is there already and of the same weights stays."""
    folder, config = open_run(task.run, task.storage)
    reid = open_reid(task.data, task.storage)
    identity = _identity(task, folder, config)
    before = _scored(folder, reid, task.weights, identity)
    if before is not None:
        return before
    if task.weights.name == COLOUR_HISTOGRAM:
        evaluation = zero_shot.evaluate_histogram(reid)
    else:
        backbone = load_backbone(task.weights, folder, config).to(device)
        mean, std = MEAN_STD[config.views.statistics]
        how = EmbedConfig(threads=threads, mean=mean, std=std, interpolation=config.evaluation.interpolation)
        evaluation = zero_shot.evaluate_backbone(
            backbone, reid, task.weights, size=config.backbone.size, device=device, config=how,
            headline=feature_of(config.method.name, backbone.parts),
        )  # fmt: skip
    evaluation = replace(evaluation, settings=evaluation.settings | {"identity": identity})
    zero_shot.save(evaluation, reid, folder.store)
    return zero_shot.metrics(evaluation, reid)


def score_export(url: str, data: str, storage: StorageConfig, *, out: str = "", threads: int = 2) -> dict[str, Any]:
    """Score the weights of an export or import, at the size and with the statistics on its card; write `evaluation/`
    below `out`, or beside them."""
    store = open_store(url, storage)
    card, reid = exports.load_card(store), open_reid(data, storage)
    config = EmbedConfig(threads=threads, mean=tuple(card["input"]["mean"]), std=tuple(card["input"]["std"]))
    backbone = exports.load_backbone(store)
    weights = Weights("exported", card.get("step"), card.get("samples"))
    evaluation = zero_shot.evaluate_backbone(
        backbone, reid, weights, size=backbone.config.size, config=config,
        headline=feature_of(_method_of(card), backbone.parts),
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


def _identity(task: Task, folder: RunFolder, config: RunConfig) -> str:
    """What must be equal for old scores to stand."""
    if task.weights.name == COLOUR_HISTOGRAM:
        return task.data
    if task.weights.name == RANDOM:
        return f"{task.data} seed {config.seed} {config.backbone}"
    return f"{task.data} {checkpoint.read_marker(folder.at('checkpoints'), task.weights.name).sha256}"


def _scored(folder: RunFolder, reid: ReIDSet, weights: Weights, identity: str) -> dict[str, Any] | None:
    try:
        before = json.loads(folder.store.read(f"evaluation/{reid.name}/{weights.name}/metrics.json"))
    except NotFoundError:
        return None
    return before if before.get("settings", {}).get("identity") == identity else None


def table(scores: list[dict[str, Any]]) -> str:
    """The scores as lines of a plain table, in percent."""
    lines = [f"{'weights':<20}{'samples':>12}  {'feature':<10}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}"]
    for row in scores:
        for name, found in row["features"].items():
            samples = "" if row["samples"] is None else f"{row['samples']:,}"
            numbers = "".join(f"{100 * found[key]:7.1f}" for key in ("mAP", "rank1", "rank5", "rank10"))
            lines.append(f"{row['weights']:<20}{samples:>12}  {name:<10}{numbers}")
    return "\n".join(lines)
