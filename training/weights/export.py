"""Weights in and out: a backbone as safetensors that timm loads, with a card that says what it is and where from.

timm has no ICS stem: such a backbone keeps its own key names, its card's "timm" is null, and `load_backbone` loads it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError
from datapipe.storage import Store, open_store
from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from training.nn.identity.necks import NeckedBackbone, TokenNecks
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.weights.counted_keys import check_counted, load_counted

WEIGHTS, NECKS, CARD = "backbone.safetensors", "necks.safetensors", "card.json"
CARD_FORMAT = 1
MOST_CARD_BYTES = 16 << 20
MOST_PARTS = 1_000
KINDS_OF_NECKS = tuple((fusion, neck) for fusion in ("cat", "mean") for neck in ("one", "each"))
LOADING = {
    "patch": "timm.create_model(**timm) and its load_state_dict, or training.weights.load_backbone(folder)",
    "ics": "training.weights.load_backbone(folder) alone: timm has no ICS stem",
}
"""Stem -> how a card says its weights are loaded."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide how exported weights are read."""
    return {package: version(package) for package in ("torch", "timm", "safetensors")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a card says beside the architecture. The caller knows it."""

    method: str = ""
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The resolved configuration of the run."""
    manifest: str = ""
    """Id of the data set."""
    licence: str = ""
    """Licence of the data, as its manifest has it: it binds the weights too."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was used to choose the data, as its manifest notes it: labelled data, for one. It binds the weights too."""
    trained_on: str = ""
    """Name of the labelled data set, of weights that were trained on one, with its labels or without."""
    samples: int = 0
    """Images seen."""
    step: int = 0
    """Optimizer steps done."""
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The published weights that these are, or were continued from: file, checksum, layout, what was left out."""
    fusion: str = ""
    """How CLS and part tokens are put together in the feature that a run's weights are scored by, "cat" or "mean";
    empty: there are no part tokens, or `origin` says it, of published weights."""
    mean: Triple = IMAGENET_MEAN
    """Subtracted from RGB values in 0..1 before the backbone."""
    std: Triple = IMAGENET_STD
    """Divides after that."""
    versions: dict[str, str] = dataclasses.field(default_factory=versions)


def export(
    backbone: VisionTransformer, out: Store, provenance: Provenance, necks: TokenNecks | None = None
) -> dict[str, Any]:
    """Write `backbone.safetensors`, `necks.safetensors` where features are scored behind necks, then `card.json`, and
    return the card.

    The weights are in timm's layout, float32. `timm.create_model(**card["timm"])` loads them with no key missing or
    left over and gives the same features (with the stored position table, the default). With the ICS stem, which timm
    does not have, `card["timm"]` is None.
    """
    data, card = serialised(backbone, provenance)
    if necks is not None:
        behind = _serialised_necks(necks)
        card["necks"] = {"fusion": necks.fusion, "neck": necks.neck, "file": NECKS, "sha256": digest(behind)}
        out.replace(NECKS, behind)
    out.replace(WEIGHTS, data)
    out.replace(CARD, json.dumps(card, indent=2).encode())
    return card


def serialised(backbone: VisionTransformer, provenance: Provenance) -> tuple[bytes, dict[str, Any]]:
    """(content of `backbone.safetensors`, its card) of an export."""
    state = to_timm(backbone)
    data = safetensors.torch.save(state, metadata={"format": "pt"})
    card: dict[str, Any] = {
        "format": CARD_FORMAT,
        "timm": timm_arguments(backbone) if backbone.config.stem == "patch" else None,
        "load": LOADING[backbone.config.stem],
        "tokens": ["cls", *(f"part{part}" for part in range(1, backbone.parts + 1)), "patches"],
        "input": {"size": backbone.config.size, "mean": provenance.mean, "std": provenance.std},
        "backbone": dataclasses.asdict(backbone.config),
        "parts": backbone.parts,
        "file": {"name": WEIGHTS, "bytes": len(data), "sha256": digest(data), "tensors": len(state)},
    }
    card |= {key: value for key, value in dataclasses.asdict(provenance).items() if key not in ("mean", "std")}
    return data, card


def _serialised_necks(necks: TokenNecks) -> bytes:
    """Content of `necks.safetensors`."""
    return safetensors.torch.save({name: _stored(tensor).contiguous() for name, tensor in necks.state_dict().items()})


def load_backbone(folder: Store | str) -> VisionTransformer:
    """An exported backbone, verified, in eval mode on the CPU. DataError where anything does not fit."""
    store = open_store(folder) if isinstance(folder, str) else folder
    card, where = load_card(store), store.address(WEIGHTS)
    data = store.read(WEIGHTS)
    if digest(data) != card["file"]["sha256"]:
        raise DataError("the weights are not those the card describes", where=where, hint="export them again")
    try:
        config, parts = BackboneConfig(**card["backbone"]), card["parts"]
    except (ValidationError, TypeError) as error:
        raise DataError(f"the card describes no backbone of this version:\n{error}", where=store.address(CARD),
                        hint="load it with the versions the card names") from error  # fmt: skip
    return filled(config, parts, from_timm(tensors_of(data, where), parts), where=where).eval()


def tensors_of(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises DataError where it is damaged."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the file is damaged: {error}", where=where, hint="export them again") from error


def filled(config: BackboneConfig, parts: int, state: Mapping[str, Tensor], *, where: str) -> VisionTransformer:
    """A backbone on the CPU with these tensors. Raises DataError where they are not those of such a backbone, before
    there is room for it: a card may describe one of any size."""
    if config.shape.depth > len(state) or not 0 <= parts <= len(state):
        what = f"{config.shape.depth:,} blocks and {parts:,} part tokens are described, by {len(state):,} tensors"
        raise DataError(f"the weights do not fit: {what}", where=where,
                        hint="check that file and architecture belong together")  # fmt: skip
    with torch.device("meta"):
        shape = VisionTransformer(config, parts=parts)
    check_counted({name: tuple(value.shape) for name, value in shape.state_dict().items()}, state, where=where)
    backbone = shape.to_empty(device="cpu")
    load_counted(backbone, state, where=where)
    return backbone


def load_embedder(store: Store) -> VisionTransformer | NeckedBackbone:
    """What an export is scored with, verified, in eval mode on the CPU: its backbone, with its necks where it has any.
    DataError where anything does not fit."""
    backbone, card = load_backbone(store), load_card(store)
    if not (about := card.get("necks")):
        return backbone
    where = store.address(NECKS)
    if not isinstance(about, dict) or about.get("file") != NECKS or (
        about.get("fusion"), about.get("neck")) not in KINDS_OF_NECKS:  # fmt: skip
        raise DataError("the card describes no necks of this version", where=store.address(CARD),
                        hint="export them again")  # fmt: skip
    data = store.read(NECKS)
    if digest(data) != about.get("sha256"):
        raise DataError("the necks are not those the card describes", where=where, hint="export them again")
    necks = TokenNecks(backbone.width, backbone.parts, fusion=about["fusion"], neck=about["neck"], group=0)
    load_counted(necks, tensors_of(data, where), where=where)
    return NeckedBackbone(backbone, necks).eval()


def unfilled(config: BackboneConfig, parts: int, *, maskable: bool = False) -> VisionTransformer:
    """A backbone on the CPU whose numbers are yet to be loaded, all of them: drawing them takes long and is in vain."""
    with torch.device("meta"):
        backbone = VisionTransformer(config, parts=parts, maskable=maskable)
    return backbone.to_empty(device="cpu")


def load_card(store: Store) -> dict[str, Any]:
    """The card of an export, with all it must have."""
    where, hint = store.address(CARD), "point at the folder that `python -m training export` wrote"
    try:
        card = parse_record(store.read_small(CARD, MOST_CARD_BYTES, what="the card", hint=hint))
    except ValueError as error:
        raise DataError(f"the card is not JSON, or damaged: {error}", where=where, hint=hint) from error
    missing = {"format", "timm", "input", "backbone", "parts", "file"} - card.keys()
    if missing or card["format"] != CARD_FORMAT:
        lacking = f"lacks {sorted(missing)}" if missing else f"has format {card['format']}, not {CARD_FORMAT}"
        raise DataError(f"the card {lacking}", where=where, hint=hint)
    wrong = [name for name in ("input", "backbone", "file") if not isinstance(card[name], dict)]
    wrong += [] if type(card["parts"]) is int and 0 <= card["parts"] <= MOST_PARTS else ["parts"]
    wrong += [] if isinstance(card["timm"], dict | None) else ["timm"]
    if not wrong and not (isinstance(card["file"].get("sha256"), str) and all(
            _is_triple(card["input"].get(name)) for name in ("mean", "std"))):  # fmt: skip
        wrong = ["file", "input"]
    if wrong:
        raise DataError(f"the card is damaged: {' and '.join(wrong)} cannot be what it says", where=where, hint=hint)
    return card


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(one, int | float) for one in value)


def timm_arguments(backbone: VisionTransformer) -> dict[str, Any]:
    """What `timm.create_model` needs to build this architecture."""
    config, shape = backbone.config, backbone.config.shape
    family = "vit_small" if config.arch == "custom" else config.arch
    return {
        "model_name": f"{family}_patch16_224",
        "img_size": config.size,
        "patch_size": config.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "reg_tokens": backbone.parts,
        "num_classes": 0,
        **({"init_values": config.layer_scale} if config.layer_scale else {}),
    }


def create_model_call(card: Mapping[str, Any]) -> str:
    """The Python expression that builds the exported model, to be printed; for an ICS stem, words."""
    if card["timm"] is None:
        return LOADING["ics"]
    arguments = dict(card["timm"])
    name = arguments.pop("model_name")
    return ", ".join([f'timm.create_model("{name}"', *(f"{key}={value}" for key, value in arguments.items())]) + ")"


@torch.no_grad()
def to_timm(backbone: VisionTransformer) -> dict[str, Tensor]:
    """timm's layout: part tokens are its register tokens, all positions one table in the order of the tokens. A mask
    token stays behind: nothing but masked training uses it."""
    state = {name: _stored(tensor) for name, tensor in backbone.state_dict().items() if name != "masked_embed"}
    if backbone.parts:
        numbers = range(1, backbone.parts + 1)
        positions = [state.pop("cls_pos"), *(state.pop(f"part{number}_pos") for number in numbers)]
        state["pos_embed"] = torch.cat([*positions, state["pos_embed"]], dim=1)
        state["reg_token"] = torch.cat([state.pop(f"part_token{number}") for number in numbers], dim=1)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def from_timm(state: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
    """The inverse of `to_timm`."""
    ours = dict(state)
    if parts and {"pos_embed", "reg_token"} <= ours.keys():
        tokens, positions = ours.pop("reg_token"), ours["pos_embed"]
        ours["cls_pos"], ours["pos_embed"] = positions[:, :1], positions[:, 1 + parts :]
        for number in range(1, parts + 1):
            ours[f"part_token{number}"] = tokens[:, number - 1 : number]
            ours[f"part{number}_pos"] = positions[:, number : number + 1]
    return ours


def _stored(tensor: Tensor) -> Tensor:
    """On the CPU; numbers as float32, counts as they are."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None)


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()
