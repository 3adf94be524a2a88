"""What weights are and where they come from, as far as it decides what their scores may be compared with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from datapipe.storage import full_url
from training import methods
from training.config.run_config import RunConfig
from training.methods.base import Method, MethodSettings
from training.nn.identity.fusion import Fusion
from training.nn.identity.necks import FEATURE as NECK
from training.nn.vision_transformer import BackboneConfig

WITH_LABELS, WITHOUT_LABELS = "supervised", "usl"
"""Tasks of weights that were trained on a ReID data set."""
BY_OTHERS = {"fine_tuned": WITH_LABELS, "usl": WITHOUT_LABELS}
"""How the names of layouts of weights end that others trained on a ReID data set, and what scores of them are
called."""

WHERE = "method, on the card of these weights"


@dataclass(frozen=True)
class WeightsOrigin:
    """Facts about one set of weights."""

    family: str
    """How they were pre-trained, as recipes write it; empty: unknown, or not at all."""
    task: str
    """"zero-shot", as pre-training left them; "supervised", fine-tuned on identities; "usl", trained without labels;
    "uda", likewise after fine-tuning on another data set."""
    arch: str
    stem: str
    parts: int
    fusion: str = ""
    """How CLS and part tokens are put together in the feature that is quoted, "cat" or "mean"; empty: no parts."""
    sha256: str = ""
    """SHA-256 of the weights' file; empty: random weights."""
    trained_on: str = ""
    """Where fine-tuning learnt from, if not from the data set that is scored."""
    label_fraction: float = 1.0
    """Share of the identities that fine-tuning learnt from."""
    file: str = ""
    """The file of others that they began as."""
    source: str = ""
    """Of domain adaptation: the data set that was trained on with labels before; empty: unknown, or none."""

    def to_tree(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def of_run(
    config: RunConfig, data: str, *, sha256: str = "", origin: Mapping[str, Any] = MappingProxyType({})
) -> WeightsOrigin:
    """The origin of a run's weights that are scored on `data`: of a checkpoint, whose marker has both its digest and
    what the run started from; without these, of the initial weights that the run's seed draws."""
    kind = methods.of(config.method)
    tuned = kind.fine_tunes and bool(sha256)
    return WeightsOrigin(
        family="" if not sha256 else _family(origin) if tuned else config.method.name,
        task=_adapted(kind.task, origin) if tuned else "zero-shot",
        arch=config.backbone.arch, stem=config.backbone.stem, parts=kind.parts(config.method),
        fusion=methods.fusion(config.method), sha256=sha256,
        trained_on=_other(config.evaluation.data, data) if tuned else "",
        label_fraction=_label_fraction(config.method) if tuned else 1.0,
        file=_file(origin), source=_source(origin) if tuned else "",
    )  # fmt: skip


def of_card(card: Mapping[str, Any], data: str) -> WeightsOrigin:
    """The origin of exported or imported weights that are scored on `data`."""
    own = _fine_tunes(card)
    recipe = card.get("recipe", {}) if own else {}
    backbone = BackboneConfig(**card["backbone"])
    return WeightsOrigin(
        family=_family(card), task=task_of(card),
        arch=backbone.arch, stem=backbone.stem, parts=int(card["parts"]), fusion=fusion_of(card) or "",
        sha256=card["file"]["sha256"],
        trained_on=_other(recipe.get("evaluation", {}).get("data", ""), data),
        label_fraction=_label_fraction(_settings(card)) if own else 1.0,
        file=_file(card.get("origin") or {}), source=_source(card.get("origin") or {}) if own else "",
    )  # fmt: skip


def task_of(card: Mapping[str, Any]) -> str:
    """What scores of these weights are called, as `WeightsOrigin.task`. Raises ConfigError for a method that is not
    here."""
    origin = card.get("origin") or {}
    if card.get("method"):
        return _adapted(methods.named(card["method"], where=WHERE).task, origin)
    return _of_layout(origin)


def _of_layout(origin: Mapping[str, Any]) -> str:
    """The task of weights of others, by the layout of their file."""
    layout = str(origin.get("layout", ""))
    return next((task for ending, task in BY_OTHERS.items() if layout.endswith(ending)), "zero-shot")


def _adapted(task: str, origin: Mapping[str, Any]) -> str:
    """Training without labels is adaptation where it began with weights that were fine-tuned on labels. `origin`: of
    those: the method of an export, or the layout of a file."""
    before = methods.named(origin["method"], where=WHERE).task if origin.get("method") else _of_layout(origin)
    return "uda" if task == WITHOUT_LABELS and before == WITH_LABELS else task


def _source(origin: Mapping[str, Any]) -> str:
    """Name of the data set that the weights a run began with were fine-tuned on with labels."""
    return str(origin.get("trained_on", "")) if _adapted(WITHOUT_LABELS, origin) == "uda" else ""


def is_fine_tuned(card: Mapping[str, Any]) -> bool:
    """Was it trained on a ReID data set, here or by others? Raises ConfigError for a method that is not here."""
    return task_of(card) != "zero-shot"


def fusion_of(card: Mapping[str, Any]) -> Fusion | None:
    """How CLS and part tokens are put together in the feature that is quoted; None where there are no parts."""
    if not card["parts"]:
        return None
    said = (about.get("fusion") for about in (card.get("necks") or {}, card, card.get("origin") or {}))
    return next(filter(None, said), "cat")  # cards of versions that knew no other way do not say it


def quoted_feature(card: Mapping[str, Any]) -> str:
    """The feature whose scores are quoted: as the method says, or as others rank by their files. Raises ConfigError for
    a method that is not here."""
    if card.get("necks"):
        return NECK
    kind = methods.named(card["method"], where=WHERE) if card.get("method") else Method
    of_tokens = int(card["parts"]), fusion_of(card) or "cat"
    feature = kind.quoted_feature(*of_tokens)
    return Method.quoted_feature(*of_tokens) if feature == NECK else feature  # an export without its necks


def _fine_tunes(card: Mapping[str, Any]) -> bool:
    """Were these weights fine-tuned by a method of ours, or of another package?"""
    return bool(card.get("method")) and methods.named(card["method"], where=WHERE).fine_tunes


def _settings(card: Mapping[str, Any]) -> MethodSettings:
    return methods.read_settings(card["method"], card.get("recipe", {}).get("method", {}), where=WHERE)


def _label_fraction(config: MethodSettings) -> float:
    sampling = methods.of(config).by_identity(config)
    return 1.0 if sampling is None else sampling.fraction


def _family(about: Mapping[str, Any]) -> str:
    """The method that pre-trained the weights of a card, or those that a run began with by its marker; of fine-tuned
    weights, the method of those that they began with."""
    name = str(about.get("method") or "")
    if name and not (name in methods.known() and methods.named(name).fine_tunes):
        return name
    layout = str(about.get("layout", ""))
    of_layout = (name for name, kind in methods.known().items() if kind.layouts and layout.startswith(kind.layouts))
    return next(of_layout, "") or (_family(about["origin"]) if isinstance(about.get("origin"), Mapping) else "")


def _file(origin: Mapping[str, Any]) -> str:
    inner = origin.get("origin")
    return _file(inner) if isinstance(inner, Mapping) and inner else str(origin.get("file", ""))


def _other(trained_on: str, scored: str) -> str:
    """The data set that was learnt from, by the end of its address; empty: the one that is scored, or unknown."""
    if not trained_on or full_url(trained_on) == full_url(scored):
        return ""
    return trained_on.rstrip("/").rpartition("/")[2]
