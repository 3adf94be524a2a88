"""Scores of a run's weights: the random ones it began with, every checkpoint it kept, and the colour histogram; and
of exported or imported ones."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.storage import Store, open_store
from datapipe.views.normalisation import MEAN_STD
from training import checkpoint, methods
from training.config import recipe_toml as recipes
from training.config.build import build_method
from training.config.continuation import saved_config
from training.config.run_config import RunConfig
from training.core.out_of_memory import scoring_memory
from training.core.run_folder.run_folder import RunFolder
from training.evaluation import weights_origin
from training.evaluation.weights_origin import WeightsOrigin
from training.methods.base import Method
from training.nn.vision_transformer import VisionTransformer
from training.reid import zero_shot
from training.reid.datasets.open_dataset import ReIDSet, check_images, open_reid
from training.reid.embed import EmbedConfig
from training.reid.settings import RANDOM, ScoringConfig
from training.reid.zero_shot import COLOUR_HISTOGRAM, Weights
from training.weights import export as exports
from training.weights.counted_keys import first_few
from training.weights.export import CARD, Provenance

EXPORTED = "exported"
"""Name of the weights of an export or import among the scores."""


@dataclass(frozen=True)
class ScoringTask:
    """One set of weights to score on one test set. Picklable."""

    run: str
    """Run folder, or the folder of an export or import."""
    data: str
    weights: Weights
    storage: StorageConfig
    scoring: ScoringConfig = ScoringConfig()
    out: str = ""
    """Folder that `evaluation/` goes into; empty: `run`."""
    interpolation: Literal["", "bilinear", "bicubic"] = ""
    """How test images are resized; empty: as the run's recipe says, bilinear for exports."""


class Subject(NamedTuple):
    """What is to be scored, before anything heavy is read."""

    weights: Weights
    identity: str
    """What must be equal, beside data and settings, for old scores to stand."""
    origin: WeightsOrigin | None
    """Origin of the weights; None: the colour histogram, which has none."""
    embed: EmbedConfig
    headline: str
    load: Callable[[], Any]
    """The network that is scored: a backbone, or what `Method.embedder` gives."""


def open_data(url: str, storage: StorageConfig, scoring: ScoringConfig, *, images: bool = True) -> ReIDSet:
    """A test set as the settings say what it is, its images compared too; raises as `open_reid` and `check_images`."""
    opened = open_reid(url, storage, name=scoring.data_name, allow_partial=scoring.allow_partial)
    return check_images(opened, allow_partial=scoring.allow_partial) if images else opened


def open_run(url: str, storage: StorageConfig) -> tuple[RunFolder, RunConfig]:
    """A run folder and its resolved recipe. Raises DataError where there is none."""
    folder = RunFolder(url, storage)
    config = saved_config(folder)
    if config is None and next(folder.names(""), None) is None:
        raise NotFoundError("there is nothing at this address", where=url,
                            hint="check for a typing mistake")  # fmt: skip
    if config is None:
        raise DataError("this is no run folder: it has no config.toml", where=url,
                        hint="give the run's --out, or the folder of an export or import")  # fmt: skip
    return folder, config


def is_run(address: str, storage: StorageConfig) -> bool:
    """Is it a run folder, rather than one of its checkpoints, or an export?"""
    return not open_store(address, storage).exists(CARD) and saved_config(RunFolder(address, storage)) is not None


def tasks(
    address: str, data: str, storage: StorageConfig, scoring: ScoringConfig = ScoringConfig(), *,  # noqa: B008  (frozen)
    out: str = "", interpolation: Literal["", "bilinear", "bicubic"] = "",
) -> list[ScoringTask]:  # fmt: skip
    """What there is to score at an address, in the order in which it is shown.

    Of a run: colour histogram, random weights, and the complete checkpoints, oldest first; of one of its checkpoints
    (`.../checkpoints/step_0012000`), or of an export or import: that alone. The test set is checked first, its images
    too: see `check_images`.
    """
    run, all_weights = weights_at(address, storage)
    open_data(data, storage, scoring)
    return [ScoringTask(run, data, weights, storage, scoring, out, interpolation) for weights in all_weights]


def weights_at(address: str, storage: StorageConfig) -> tuple[str, list[Weights]]:
    """(folder of the run or export, weights in it: baselines first, then checkpoints, oldest first, but for those that
    the run prunes in this moment). Raises DataError where there are none."""
    if open_store(address, storage).exists(CARD):
        card = exports.load_card(open_store(address, storage))
        return address, [Weights(EXPORTED, card.get("step"), card.get("samples"))]
    run, name = checkpoint_of(address)
    folder, _ = open_run(run, storage)
    store = folder.at("checkpoints")
    names = checkpoint.complete(store)
    if not names:
        raise DataError("the run has no complete checkpoint", where=store.url, hint="let it reach its first save")
    if name and name not in names:
        raise DataError("this checkpoint is not complete", where=address, hint=f"complete are {first_few(names)}")
    checkpoints: list[Weights] = []
    for one in [name] if name else names:
        try:
            marker = checkpoint.read_marker(store, one)
        except NotFoundError:
            if name or not checkpoint.was_pruned(store, one):
                raise
            continue
        checkpoints.append(Weights(one, marker.step, marker.samples))
    baselines = [] if name else [Weights(COLOUR_HISTOGRAM), Weights(RANDOM, 0, 0)]
    return run, baselines + checkpoints


def checkpoint_of(address: str) -> tuple[str, str]:
    """(run, name of its checkpoint) of the folder of a checkpoint; any other address and nothing."""
    run, between, name = address.rstrip("/").rpartition("/checkpoints/")
    return (run, name) if between and "/" not in name else (address, "")


def score(
    task: ScoringTask, *, threads: int = 2, device: torch.device | str = "cpu", out: Store | None = None
) -> dict[str, Any]:
    """Score one task and write its folder below `evaluation/`; what is there already, of the same weights and with the
    same feature quoted, stays.
    `out`: the store of the task's folder, where it is open."""
    with scoring_memory(task.scoring.embed_batch, device):
        return _score(task, threads, device, out or open_store(task.out or task.run, task.storage))


def _score(task: ScoringTask, threads: int, device: torch.device | str, out: Store) -> dict[str, Any]:
    subject = subject_of(task, threads)
    reid = open_data(task.data, task.storage, task.scoring, images=task.scoring.allow_partial)  # `tasks` has refused
    identity = _identity(task, subject, reid)
    before = _scored(out, reid, task.weights, identity)
    if before is not None and (subject.origin is None or before["headline"] == subject.headline):
        return before
    if subject.origin is None:
        evaluation = zero_shot.evaluate_histogram(reid, scoring=task.scoring)
    else:
        backbone = subject.load().to(device)
        evaluation = zero_shot.evaluate_backbone(
            backbone, reid, task.weights, size=backbone.config.size, device=device, config=subject.embed,
            headline=subject.headline, scoring=task.scoring,
        )  # fmt: skip
        evaluation.settings["model"] = subject.origin.to_tree()
    evaluation.settings["identity"] = identity
    zero_shot.save(evaluation, reid, out)
    return zero_shot.metrics(evaluation, reid)


@contextlib.contextmanager
def passing_over_pruned(task: ScoringTask) -> Iterator[None]:
    """Around scoring: where it fails for a checkpoint that its run has deleted since the task was made, a line says
    that it is left out, and nothing is raised."""
    try:
        yield
    except (DataError, NotFoundError):
        checkpoints, name = RunFolder(task.run, task.storage).at("checkpoints"), task.weights.name
        if name in (EXPORTED, RANDOM, COLOUR_HISTOGRAM) or not checkpoint.was_pruned(checkpoints, name):
            raise
        print(f"{name} is left out: its run has pruned it before it could be scored", flush=True)


def subject_of(task: ScoringTask, threads: int) -> Subject:
    """What a task is about; nothing heavy is read yet."""
    return _of_export(task, threads) if task.weights.name == EXPORTED else _of_run(task, threads)


def _of_run(task: ScoringTask, threads: int) -> Subject:
    folder, config = open_run(task.run, task.storage)
    mean, std = MEAN_STD[config.views.statistics]
    interpolation = task.interpolation or config.evaluation.interpolation
    name = task.weights.name
    origin, identity = None, ""
    if name == RANDOM:
        identity = f"seed {config.seed} {config.backbone}"
        origin = weights_origin.of_run(config, task.data)
    elif name != COLOUR_HISTOGRAM:
        marker = checkpoint.read_marker(folder.at("checkpoints"), name)
        identity = marker.sha256
        origin = weights_origin.of_run(config, task.data, sha256=marker.sha256, origin=marker.origin)
    return Subject(
        task.weights, identity, origin,
        EmbedConfig(threads=threads, mean=mean, std=std, interpolation=interpolation, batch=task.scoring.embed_batch),
        methods.quoted_feature(config.method),
        lambda: load_method(task.weights, folder, config).embedder().eval(),
    )  # fmt: skip


def _of_export(task: ScoringTask, threads: int) -> Subject:
    """At the size and with the statistics on its card."""
    store = open_store(task.run, task.storage)
    card = exports.load_card(store)
    mean, std = (tuple(card["input"][key]) for key in ("mean", "std"))
    return Subject(
        task.weights, card["file"]["sha256"], weights_origin.of_card(card, task.data),
        EmbedConfig(threads=threads, mean=mean, std=std, interpolation=task.interpolation or "bilinear",
                    batch=task.scoring.embed_batch),
        weights_origin.quoted_feature(card),
        lambda: exports.load_embedder(store),
    )  # fmt: skip


def load_backbone(weights: Weights, folder: RunFolder, config: RunConfig) -> VisionTransformer:
    """The backbone that is evaluated, in eval mode: of the fresh method, or of a checkpoint (verified)."""
    return load_method(weights, folder, config).backbone().eval()


def load_method(weights: Weights, folder: RunFolder, config: RunConfig) -> Method:
    """Load the whole method with these weights, on the CPU."""
    method = build_method(config)
    if weights.name != RANDOM:
        checkpoint.load_model(folder.at("checkpoints"), weights.name, method)
    return method


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The scores of the feature that is quoted, of the content of a metrics.json."""
    scores: dict[str, float] = metrics["features"][metrics["headline"]]
    return scores


def provenance(weights: Weights, folder: RunFolder, config: RunConfig) -> Provenance:
    """What the card of exported weights of a run says of them."""
    marker = checkpoint.read_marker(folder.at("checkpoints"), weights.name)
    mean, std = MEAN_STD[config.views.statistics]
    return Provenance(
        method=config.method.name, recipe=recipes.to_tree(config), manifest=marker.manifest, licence=licence_of(folder),
        notes=notes_of(folder), trained_on=trained_on(folder) if methods.of(config.method).fine_tunes else "",
        samples=marker.samples, step=marker.step, origin=marker.origin, mean=mean, std=std,
        fusion=methods.fusion(config.method),
        versions=exports.versions() | methods.package_of(config.method.name),
    )  # fmt: skip


def licence_of(folder: RunFolder) -> str:
    """The licence of the data a run was trained on, as its environment.json has it; empty if unknown."""
    return str(_manifest_of(folder).get("licence", ""))


def notes_of(folder: RunFolder) -> list[str]:
    """What binds whoever uses a run's weights, as the data set that it was trained on says: labelled data that chose
    its crops, for one."""
    notes = _manifest_of(folder).get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def trained_on(folder: RunFolder) -> str:
    """Name of the data set that a run was trained on; empty if unknown."""
    return str(_manifest_of(folder).get("name", ""))


def _manifest_of(folder: RunFolder) -> dict[str, Any]:
    """What the run's environment.json says of its data set."""
    manifest = folder.read_record("environment.json").get("manifest")
    return manifest if isinstance(manifest, dict) else {}


def _identity(task: ScoringTask, subject: Subject, reid: ReIDSet) -> str:
    """What must be equal for old scores to stand: data, weights, settings."""
    data = f"{task.data} {reid.about()['counts']} {task.scoring}"
    return " ".join(filter(None, [data, task.interpolation, subject.identity]))


def _scored(out: Store, reid: ReIDSet, weights: Weights, identity: str) -> dict[str, Any] | None:
    try:
        before = parse_record(out.read(f"evaluation/{reid.name}/{weights.name}/metrics.json"))
    except (NotFoundError, ValueError):  # a damaged one is as good as none
        return None
    settings = before.get("settings")
    return before if isinstance(settings, dict) and settings.get("identity") == identity else None


def table(scores: list[dict[str, Any]]) -> str:
    """The scores as lines of a plain table, in percent."""
    names = [name for row in scores for name in row["features"]]
    width = max(map(len, [*names, "feature"])) + 2
    lines = [f"{'weights':<20}{'samples':>12}  {'feature':<{width}}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}{'mINP':>7}"]
    for row in scores:
        for name, measured in row["features"].items():
            samples = "" if row["samples"] is None else f"{row['samples']:,}"
            numbers = "".join(f"{100 * measured[key]:7.1f}" for key in ("mAP", "rank1", "rank5", "rank10", "mINP"))
            trapezoid = f"  trapezoid mAP {100 * measured['trapezoid_mAP']:.1f}" if "trapezoid_mAP" in measured else ""
            lines.append(f"{row['weights']:<20}{samples:>12}  {name:<{width}}{numbers}{trapezoid}")
    return "\n".join(lines)
