"""Training on a labelled data set as an evaluation, with its labels or without: weights, data, recipe -> a run that
scores itself.

Everything it starts from comes to lie in the run folder, so that it goes on from there alone:

    init/<checksum>/   the weights as an export        shards/   the training part of the data set
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.storage import Store, open_store, split_url
from datapipe.views.normalisation import MEAN_STD
from training import checkpoint, methods
from training.config import recipe_toml as recipes
from training.config.continuation import saved_config
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder
from training.evaluation import evaluation
from training.evaluation.weights_origin import WHERE, WITH_LABELS, task_of
from training.methods.base import Method
from training.nn.vision_transformer import BackboneConfig
from training.reid.datasets.training_shards import shard_training_part
from training.reid.settings import RANDOM, ScoringConfig
from training.reid.zero_shot import Weights
from training.weights import export as exports
from training.weights.export import CARD, Provenance
from training.weights.published import Stated, read_published
from training.weights.safe_load import is_weights_file

RECIPES = {"mae": "supervised_mae"}
"""Layout of a published file -> the recipe for its weights, where their part tokens alone do not tell."""
GIVEN = ("arch", "patch", "stem", "width", "depth", "heads", "mlp_ratio", "layer_scale")
"""Settings of a backbone that its weights decide."""


def prepare(
    weights: str, data: str, out: str, *, task: str = "supervised", recipe: str = "", flags: Sequence[str] = (),
    scoring: ScoringConfig = ScoringConfig(), storage: StorageConfig = StorageConfig(),  # noqa: B008  (frozen)
    prog: str = recipes.PRETRAIN,
) -> RunConfig:  # fmt: skip
    """The resolved recipe of fine-tuning `weights` on `data`, after what it starts from was put into `out`.

    `task`: "supervised" or "usl". `recipe`: empty for the one that suits it, the weights and the data. `flags`: dotted
    ones of the recipe, which come last; with `--stream.manifest` training images are read from there. Raises
    ConfigError, DataError, StorageError.
    """
    if not out:
        raise ConfigError("fine-tuning needs a run folder", where="--out", hint="--out runs/market1501")
    reid = evaluation.open_data(data, storage, scoring)
    start = "" if weights == RANDOM else as_export(weights, out, storage)
    card = exports.load_card(open_store(start, storage)) if start else {}
    final = resolved(start, card, reid.name, data, out, task=task, recipe=recipe, flags=flags, scoring=scoring,
                     storage=storage, prog=prog)  # fmt: skip
    if final.stream.manifest or final.stream.mix:
        return final
    manifest = shard_training_part(reid, open_store(out, storage).address("shards"), storage)
    return replace(final, stream=replace(final.stream, manifest=manifest.url))


def resolved(
    start: str, card: dict[str, Any], set_name: str, data: str, out: str, *, task: str, recipe: str = "",
    flags: Sequence[str] = (), scoring: ScoringConfig, storage: StorageConfig, adapted: bool | None = None,
    prog: str = recipes.PRETRAIN,
) -> RunConfig:  # fmt: skip
    """The recipe of fine-tuning weights, but for the shards it reads; nothing is read or written.

    `start`: export of the weights, with this card; both empty: none. `set_name`: of the data set at `data`. `adapted`:
    whether the weights will have been fine-tuned on another data set by then; None: as the card says. All else as
    `prepare`, with the same errors.
    """
    suiting = suited_recipe(card) if task == "supervised" else without_labels(card, set_name, adapted=adapted)
    config = _suited(recipes.load(recipe or suiting), card)
    changed = replace(config, out=out, storage=storage, init=replace(config.init, weights=start),
                      evaluation=replace(config.evaluation, data=data, scoring=scoring))  # fmt: skip
    final = recipes.override(changed, flags, prog=prog)
    if task not in (kinds := tasks_of(final)):
        raise ConfigError(f"the recipe is of {final.method.name}, which is not training for --tasks {task}",
                          where="--recipe", hint=f"--tasks {kinds[0]}" if kinds else
                          f"one of {', '.join(_recipes_of(task))}")  # fmt: skip
    return final


def tasks_of(config: RunConfig) -> tuple[str, ...]:
    """Tasks of `evaluate` that a recipe can carry out; none for pre-training."""
    kind = methods.of(config.method)
    return (kind.task,) if kind.fine_tunes else ()


def without_labels(card: dict[str, Any], data: str, *, adapted: bool | None = None) -> str:
    """Name of the recipe that trains weights with this card on a data set without its labels: that for MSMT17 there,
    that for Market-1501 anywhere else; with part tokens another one where the weights were fine-tuned with labels
    before (`adapted`; None: as the card says)."""
    tuned = task_of(card) == WITH_LABELS if adapted is None and card else bool(adapted)
    kind = ("uda_pass" if tuned else "usl_pass") if card.get("parts") else "usl"
    return f"{kind}_{'msmt17' if data == 'msmt17' else 'market'}"


def suited_recipe(card: dict[str, Any]) -> str:
    """Name of the recipe for weights with this card, as what they began with or the method they are of says."""
    if (layout := card.get("origin", {}).get("layout")) in RECIPES:
        return RECIPES[layout]
    kind: type[Method[Any]] = methods.named(card["method"], where=WHERE) if card.get("method") else Method
    return kind.fine_tuning_recipe(card.get("parts", 0))


def _recipes_of(task: str) -> list[str]:
    """Names of the recipes that carry out a task."""
    kinds = (kind for kind in methods.known().values() if kind.fine_tunes and kind.task == task)
    return [name for kind in kinds for name in kind.published]


def as_export(weights: str, out: str, storage: StorageConfig) -> str:
    """The folder of an export with these weights: they are one, or it is made below `out`: of a run's newest
    checkpoint, of the one that is named, or of a file that others published."""
    folder, name = split_url(weights)
    if name == exports.WEIGHTS and open_store(folder, storage).exists(CARD):
        return folder
    if is_weights_file(weights):
        return _imported(weights, out, storage)
    if open_store(weights, storage).exists(CARD):
        return weights
    run, chosen = evaluation.checkpoint_of(weights)
    config = saved_config(RunFolder(run, storage))
    if config is None:
        raise NotFoundError("there are no weights here", where=weights,
                            hint="a run folder, a checkpoint in it, the folder of an export or import, or a file of "
                            "weights")  # fmt: skip
    return _exported(RunFolder(run, storage), chosen, config, out, storage)


def _imported(file: str, out: str, storage: StorageConfig) -> str:
    published = read_published(file, storage, Stated())
    mean, std = MEAN_STD[published.statistics]
    store = _below(out, published.origin["sha256"], storage)
    if not store.exists(CARD):
        provenance = Provenance(origin=published.origin, mean=mean, std=std)
        exports.export(published.backbone, store, provenance, published.necks)
    return store.url


def _exported(run: RunFolder, chosen: str, config: RunConfig, out: str, storage: StorageConfig) -> str:
    names = checkpoint.complete(run.at("checkpoints"))
    if not names or chosen not in ("", *names):
        raise DataError(f"the run has no complete checkpoint {chosen}".rstrip(), where=run.url,
                        hint="let it reach its first save; `python -m training checkpoints` lists them")  # fmt: skip
    weights = Weights(chosen or names[-1])
    store = _below(out, checkpoint.read_marker(run.at("checkpoints"), weights.name).sha256, storage)
    if not store.exists(CARD):
        backbone = evaluation.load_backbone(weights, run, config)
        exports.export(backbone, store, evaluation.provenance(weights, run, config))
    return store.url


def _below(out: str, sha256: str, storage: StorageConfig) -> Store:
    """A folder for these weights and no others: a run never goes on with others than it began with."""
    return open_store(out, storage).at("init", sha256[:12])


def _suited(config: RunConfig, card: dict[str, Any]) -> RunConfig:
    """The recipe with the backbone of the weights."""
    if not card or not methods.of(config.method).fine_tunes:
        return config
    own = BackboneConfig(**card["backbone"])
    backbone = replace(config.backbone, **{name: getattr(own, name) for name in GIVEN})
    method = methods.of(config.method).for_weights(config.method, card["parts"])
    return replace(config, backbone=backbone, method=method)
