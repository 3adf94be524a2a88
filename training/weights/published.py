"""Published weights: which layout a file has, where the backbone is in it, and what is left out and why.

Every tensor of a file is either used or named as left out; keys that are missing, left over or of another shape are an
error. Sources of the layouts: the loaders of TransReID-SSL, PASS and PersonViT (`vit_pytorch.py` load_param), the
training scripts of DINO, iBOT, TransReID-SSL and PASS (save_dict), MAE `util/misc.py` save_model.
"""

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.errors import DataError
from datapipe.storage import open_store, split_url
from training.nn.identity.fusion import Fusion, fused_width
from training.nn.identity.necks import TokenNecks
from training.nn.vision_transformer import ARCHITECTURES, BackboneConfig, Shape, VisionTransformer
from training.weights.counted_keys import first_few, load_counted
from training.weights.export import digest, filled
from training.weights.safe_load import Arguments, read_weights

Network = Literal["teacher", "student"]

PROJECTION = {"head.*": "projection head of pre-training"}
UNUSED = {"fc.*": "1000-way layer that no forward pass uses"}
UNUSED_IN_CHECKPOINT = {"backbone.fc.*": UNUSED["fc.*"]}
MASK_TOKEN = "mask token: only masked views in training use it"
CLASSIFIER = {
    "head.*": "classifier of ImageNet's classes",
    "pre_logits.*": "layer of ImageNet's classifier",
}
DECODER = {"decoder_*": "decoder of pre-training", "mask_token": "mask token of the decoder"}
DISTILLED = {"dist_token": "token of distillation, with its position, as TransReID leaves it out",
             "head_dist.*": "classifier of the token of distillation", **CLASSIFIER}  # fmt: skip
SAVED_ALONE = {**PROJECTION, **UNUSED_IN_CHECKPOINT, "backbone.masked_embed": MASK_TOKEN}
STRANGERS = {
    "sie_embed": "TransReID with camera or view embeddings (SIE), without which the features are others than trained",
    "b1.0.*": "TransReID with jigsaw branches (JPM), whose last trained block lies in the branch b1",
    "register_tokens": "DINOv2 with registers",
    "*.mlp.w12.*": "a ViT with SwiGLU",
    "*.gamma_1": "BEiT, or another ViT with other names of layer scale",
    "*relative_position_bias_table": "BEiT, Swin or another network with relative positions",
    "*.attn.q_bias": "BEiT or EVA",
    "text_projection": "CLIP, whose image tower has other names and another norm",
    "layer1.0.conv1.weight": "a ResNet",
    "layers.0.blocks.0.*": "Swin",
}
"""Pattern of a tensor's name, less what is before the backbone's -> what the file is; no backbone here fits."""
FINE_TUNED = {
    "base.fc.*": UNUSED["fc.*"],
    "bottleneck*": "batch norm in front of the identity classifier",
    "classifier*": "classifier of the training set's identities",
}


WITHOUT_LABELS = {"bottleneck*": "batch norm in front of the cluster memory, kept beside the backbone", **UNUSED}


class FileLayout(NamedTuple):
    """How a family of published files is laid out."""

    name: str
    about: str
    """Who publishes it."""
    prefix: str
    """How the names of the backbone's tensors begin."""
    mark: str
    """A tensor of the backbone, its name without the prefix, that tells this layout from those below it."""
    left_out: Mapping[str, str]
    """Pattern of names -> why these tensors are not used."""
    pair: bool = False
    """Do student and teacher lie side by side?"""
    beside: str = ""
    """An entry that must lie beside the two."""
    necks: bool = False
    """Are there necks, behind which others score these weights?"""
    statistics: Statistics = "imagenet"
    """What its images were normalised with."""
    distilled: bool = False
    """Is the second position that of a token of distillation?"""


LAYOUTS = (
    FileLayout("pass_checkpoint", "PASS, training checkpoint", "backbone.", "part_token1", PROJECTION, pair=True),
    FileLayout("ics_checkpoint", "TransReID-SSL with ICS stem, training checkpoint", "backbone.",
           "patch_embed.conv.0.weight", {**PROJECTION, **UNUSED_IN_CHECKPOINT}, pair=True),
    FileLayout("personvit_checkpoint", "PersonViT or iBOT, training checkpoint", "backbone.", "cls_token",
           {**PROJECTION, "backbone.masked_embed": MASK_TOKEN}, pair=True, beside="ibot_loss"),
    FileLayout("dino_checkpoint", "DINO or TransReID-SSL, training checkpoint", "backbone.", "cls_token",
           {**PROJECTION, **UNUSED_IN_CHECKPOINT}, pair=True),
    FileLayout("pass_network", "PASS, one network of a training checkpoint, saved alone", "backbone.", "part_token1",
           SAVED_ALONE),
    FileLayout("ics_network", "TransReID-SSL with ICS stem, one network of a training checkpoint, saved alone",
           "backbone.", "patch_embed.conv.0.weight", SAVED_ALONE),
    FileLayout("dino_network", "DINO, iBOT or TransReID-SSL, one network of a training checkpoint, saved alone",
           "backbone.", "cls_token", SAVED_ALONE),
    FileLayout("pass_fine_tuned", "PASS, fine-tuned", "base.", "part_token1", FINE_TUNED, statistics="half"),
    FileLayout("ics_fine_tuned", "TransReID-SSL with ICS stem, fine-tuned", "base.", "patch_embed.conv.0.weight",
           FINE_TUNED, statistics="half"),
    FileLayout("fine_tuned", "TransReID-SSL or PersonViT, fine-tuned", "base.", "cls_token", FINE_TUNED,
           statistics="half"),
    FileLayout("pass_usl", "PASS, trained without labels", "", "part_token1", WITHOUT_LABELS, statistics="half",
               necks=True),
    FileLayout("ics_usl", "TransReID-SSL with ICS stem, trained without labels", "", "patch_embed.conv.0.weight",
               WITHOUT_LABELS, statistics="half", necks=True),
    FileLayout("usl", "TransReID-SSL, trained without labels", "", "cls_token", WITHOUT_LABELS, statistics="half",
               necks=True),
    FileLayout("pass", "PASS, backbone alone", "", "part_token1", {}),
    FileLayout("ics", "TransReID-SSL with ICS stem, backbone alone", "", "patch_embed.conv.0.weight", UNUSED),
    FileLayout("ibot", "iBOT's student, backbone alone", "", "masked_embed", {"masked_embed": MASK_TOKEN}),
    FileLayout("mae", "MAE with decoder", "", "decoder_pos_embed", DECODER),
    FileLayout("distilled", "DeiT with a token of distillation", "", "dist_token", DISTILLED, distilled=True),
    FileLayout("vit", "bare ViT: TransReID-SSL, DINO, DINOv2, iBOT's teacher, MAE's encoder, timm", "", "cls_token",
           {**CLASSIFIER, **UNUSED, "mask_token": MASK_TOKEN}),
)  # fmt: skip
"""The more special before the more general: the first whose marks are there is the file's."""

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "network", "net")
"""Entries that some files put around the tensors."""

ENTRIES = {
    "student": "the other network",
    "teacher": "the other network",
    "optimizer": "state of the optimizer",
    "args": "settings of that training",
    "epoch": "how long that training was",
    "dino_loss": "centre of the loss",
    "ibot_loss": "centres of the loss",
    "fp16_scaler": "loss scaling",
    "scaler": "loss scaling",
    "best_mAP": "its best score on a test set",
}
"""Entry beside the weights -> what it is."""

ARGUMENTS = ("arch", "model", "patch_size", "epochs", "batch_size_per_gpu", "batch_size", "lr", "weight_decay",
             "drop_path", "drop_path_rate", "out_dim", "patch_out_dim", "momentum_teacher", "seed")  # fmt: skip
"""Settings that are quoted on the card, for information only."""

SHAPES = {shape.width: shape for shape in ARCHITECTURES.values()} | {1280: Shape(1280, 32, 16, 4.0)}
"""Width -> the published transformer of that width. Heads leave no trace in a file; a missing block might be none."""

LAYER_SCALE = 1e-5
"""Initial factor of a backbone that has layer scale; a file has only what became of it."""

MOST_DEPTH, MOST_WIDTH, MOST_PARTS = 1_000, 65_536, 1_000
"""Blocks, channels and part tokens that a backbone may have: beyond these a file is damaged, or no backbone."""

RATIOS = (2, 1, 3)
"""Height over width of the images that position tables were made for: 256 x 128, ImageNet's squares, 384 x 128. No
number of patches fits two of them."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the caller knows of a file. Empty or 0: what its keys and shapes say."""

    layout: str = ""
    """Name of one of LAYOUTS; another file is refused."""
    network: Network = "teacher"
    """Network of a training checkpoint to read. The published backbones are teachers."""
    fusion: Literal["", "cat", "mean"] = ""
    """How CLS and part tokens are put together in the feature that the weights are scored by. Empty: as the width of a
    classifier or of a single neck tells, else "cat"."""
    heads: int = 0
    """Attention heads."""
    depth: int = 0
    """Number of blocks."""
    size: Size | None = None
    """Image size (height, width) that the position table was made for, if it fits none of RATIOS."""


class PublishedWeights(NamedTuple):
    """What was read."""

    backbone: VisionTransformer
    """In eval mode, on the CPU, of the size that its position table was made for."""
    aside: dict[str, Tensor]
    """The network's tensors that the backbone does not use, by their names in the file."""
    origin: dict[str, Any]
    """For the card: file, checksum, layout, what was left out and why."""
    statistics: Statistics = "imagenet"
    centres: Mapping[str, Tensor] = {}
    """Centres of the loss, by their names in the file, beside the networks of a training checkpoint."""
    necks: TokenNecks | None = None
    """The necks behind which the weights are scored, in eval mode; None: they are scored without."""


def read_published(url: str, storage: StorageConfig, stated: Stated) -> PublishedWeights:
    """Read a file of published weights, local or remote. Raises DataError where anything does not fit."""
    folder, name = split_url(url)
    data = open_store(folder, storage).read(name)
    content = read_weights(data, where=url)
    entries, wrapper = _unwrapped(content)
    layout, state = _recognised(entries, stated, url)
    aside = {key: value for key, value in state.items() if _why(layout, key)}
    used = {key.removeprefix(layout.prefix): value for key, value in state.items() if key not in aside}
    if layout.distilled and (positions := used.get("pos_embed")) is not None and positions.ndim == 3:
        used["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    _refuse_what_is_no_weight(used, url)
    config, parts = _architecture(used, stated, url)
    backbone = filled(config, parts, used, where=url)
    left_out = {key: _why(layout, key) for key in aside} | _beside(content, wrapper)
    if layout.pair:
        left_out |= _beside(entries, stated.network)
    origin = {
        "file": name, "bytes": len(data), "sha256": digest(data), "layout": layout.name, "about": layout.about,
        "network": stated.network if layout.pair else "", "tensors": len(used), "left_out": left_out,
        "arguments": _arguments(content), **_identities(aside),
    }  # fmt: skip
    if fusion := _fusion(aside, backbone, stated, url):
        origin["fusion"] = fusion
    necks = _necks(aside, backbone, fusion, url) if layout.necks else None
    centres = _centres(entries) if layout.pair else {}
    return PublishedWeights(backbone.eval(), aside, origin, layout.statistics, centres, necks)


def _fusion(aside: Mapping[str, Any], backbone: VisionTransformer, stated: Stated, where: str) -> Fusion | None:
    """How weights that were trained on a ReID data set put CLS and part tokens together: as the width of what lies
    behind them tells, the classifier or a single neck, else as stated, else "cat". None where there are no parts, or
    nothing lies behind them. Raises DataError where another way is stated than the file tells, or one where there is
    none."""
    behind = _behind_fusion(aside)
    if not backbone.parts or behind is None:
        if stated.fusion:
            without = "no part tokens" if not backbone.parts else "no neck and no classifier"
            raise DataError(f"these weights have {without}: nothing is put together", where=where,
                            hint="leave --fusion away")  # fmt: skip
        return None
    ways: tuple[Fusion, ...] = ("cat", "mean")
    told = [way for way in ways if behind == fused_width(backbone.width, backbone.parts, way)]
    if told and stated.fusion not in ("", *told):
        raise DataError(f"these weights put CLS and part tokens together by {told[0]!r}, not by {stated.fusion!r}: "
                        f"what lies behind takes {behind} channels", where=where,
                        hint=f"--fusion {told[0]}, or leave it away")  # fmt: skip
    return told[0] if told else stated.fusion or "cat"


def _behind_fusion(aside: Mapping[str, Any]) -> int | None:
    """Channels of the fused feature, by a tensor that takes it in; 0: none tells, several necks take a token each;
    None: nothing lies behind the tokens."""
    several = any(re.match(r"bottleneck_(pt)?1\.", name) for name in aside)
    takers = [
        aside.get(name) for name in (("classifier.weight",) if several else ("classifier.weight", "bottleneck.weight"))
    ]
    found = [taker.shape[-1] for taker in takers if isinstance(taker, Tensor) and taker.ndim]
    return next(iter(found), 0 if several else None)


def _necks(aside: Mapping[str, Any], backbone: VisionTransformer, fusion: Fusion | None, where: str) -> TokenNecks:
    """The necks that a file has beside its backbone."""
    state = {name: tensor for name, tensor in aside.items() if name.startswith("bottleneck")}
    neck: Literal["one", "each"] = "each" if "bottleneck_pt1.weight" in state else "one"
    necks = TokenNecks(backbone.width, backbone.parts, fusion=fusion or "cat", neck=neck, group=0)
    load_counted(necks, state, where=where)
    return necks.eval()


def _unwrapped(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What lies in a wrapper, and its name; the file itself where there is none."""
    for name in WRAPPERS:
        if isinstance(content.get(name), dict):
            return content[name], name
    return content, ""


def _recognised(entries: Mapping[str, Any], stated: Stated, where: str) -> tuple[FileLayout, dict[str, Any]]:
    """The file's layout, and the state of the network asked for, less what wrappers put before its names."""
    for layout in LAYOUTS:
        state = _state(entries, layout, stated.network)
        fits = not layout.beside or layout.beside in entries
        fits = fits and (not layout.necks or "bottleneck.weight" in state)
        if fits and f"{layout.prefix}{layout.mark}" in state:
            _refuse_strangers(state, where)
            if stated.layout and stated.layout != layout.name:
                raise DataError(f"this is laid out as {layout.name} ({layout.about}), not as {stated.layout}",
                                where=where, hint=f"--as {layout.name}, or leave --as away")  # fmt: skip
            return layout, state
    _refuse_strangers(_unprefixed(entries), where)
    known = "\n".join(f"    {layout.name:<20} {layout.about}" for layout in LAYOUTS)
    raise DataError(f"the file has none of the known layouts; it holds {first_few(list(entries))}\n{known}",
                    where=where, hint="save the state_dict() of the ViT itself, its names beginning with cls_token and "
                    "blocks.0")  # fmt: skip


def _refuse_strangers(state: Mapping[str, Any], where: str) -> None:
    """Raise a DataError that names what a network of another kind is."""
    for pattern, what in STRANGERS.items():
        found = [key for key in state if fnmatch.fnmatchcase(re.sub(r"^(base|backbone)\.", "", key), pattern)]
        if found:
            raise DataError(f"this is {what}: {first_few(found)}", where=where,
                            hint="take weights of a plain ViT, or of the method without it")  # fmt: skip


def _state(entries: Mapping[str, Any], layout: FileLayout, network: Network) -> dict[str, Any]:
    state = entries.get(network) if layout.pair else entries
    return _unprefixed(state) if isinstance(state, dict) else {}


def _unprefixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what torch.compile, DDP and Lightning put before names, once or several times: `module.`, `_orig_mod.`
    and, where the network lies behind them, the attribute that held it."""
    plain = {re.sub(WRAPPED, "", str(key)): value for key, value in state.items()}
    for held in HOLDERS:
        inside = {key.removeprefix(held): value for key, value in plain.items() if key.startswith(held)}
        if not MARKS & plain.keys() and MARKS & inside.keys():
            return inside | {key: value for key, value in plain.items() if not key.startswith(held)}
    return plain


WRAPPED = r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\."
HOLDERS = ("model.", "net.", "network.", "encoder.", "student.", "teacher.", "vit.", "model.backbone.")
"""Attributes that networks lie behind in the files of frameworks."""
MARKS = frozenset(("cls_token", "base.cls_token", "backbone.cls_token", "part_token1", "backbone.part_token1"))


def _why(layout: FileLayout, key: str) -> str:
    """Why a tensor is left out; empty: it is used."""
    return next((why for pattern, why in layout.left_out.items() if fnmatch.fnmatchcase(key, pattern)), "")


def _beside(entries: Mapping[str, Any], chosen: str) -> dict[str, str]:
    """What lies beside the entry that was chosen, with what it is."""
    return {key: ENTRIES.get(key, "beside the weights") for key in entries if chosen and key != chosen}


def _centres(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """What DINO, PASS and iBOT save of their losses: `center`, `center2`, or `center_<token>` in PASS."""
    states = [entries[name] for name in ("dino_loss", "ibot_loss") if isinstance(entries.get(name), dict)]
    return {key: value for state in states for key, value in state.items() if isinstance(value, Tensor)}


def _refuse_what_is_no_weight(state: Mapping[str, Any], where: str) -> None:
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise DataError(f"these are no tensors: {first_few(strange)}", where=where, hint="save the state_dict() alone")
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise DataError(f"these hold NaN or infinity: {first_few(broken)}", where=where,
                        hint="take an earlier checkpoint")  # fmt: skip


def _architecture(state: Mapping[str, Tensor], stated: Stated, where: str) -> tuple[BackboneConfig, int]:
    """The backbone that the shapes describe, and its number of part tokens."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        raise DataError(f"the backbone is not whole; missing: {first_few(missing)}", where=where,
                        hint="fetch the file again, or ask for another --network")  # fmt: skip
    flat = [key for key, axes in zip(needed, (3, 3, 4, 2), strict=True) if state[key].ndim != axes]
    if flat:
        raise DataError(f"not the shape of a ViT's: {first_few(flat)}", where=where, hint="is this another model?")
    if empty := [key for key in needed if not state[key].numel()]:
        raise DataError(f"these have no numbers: {first_few(empty)}", where=where, hint="is this another model?")
    parts = len([key for key in state if re.fullmatch(r"part_token\d+", key)])
    if parts > MOST_PARTS:
        raise DataError(f"it has {parts:,} part tokens", where=where, hint="is this another model?")
    stem: Literal["patch", "ics"] = "ics" if "patch_embed.conv.0.weight" in state else "patch"
    patch = state["patch_embed.proj.weight"].shape[-1] * (2 if stem == "ics" else 1)
    rows, columns = _grid(state["pos_embed"].shape[1] - (0 if parts else 1), patch, stated.size, where)
    shape = _shape(state, stated, where)
    size = (rows * patch, columns * patch)
    arch: Any = next((name for name, known in ARCHITECTURES.items() if known == shape), "custom")
    own = shape._asdict() if arch == "custom" else {}
    layer_scale = LAYER_SCALE if "blocks.0.ls1.gamma" in state else 0.0
    return BackboneConfig(arch=arch, size=size, patch=patch, stem=stem, layer_scale=layer_scale, **own), parts


def _shape(state: Mapping[str, Tensor], stated: Stated, where: str) -> Shape:
    """Width and MLP from the file; heads and depth as stated, or those of the published transformer of that width."""
    width = state["cls_token"].shape[-1]
    mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    numbers = [key.split(".")[1] for key in state if re.match(r"blocks\.[0-9]+\.", key)]
    blocks = 1 + max(int(number) if len(number) < 8 else MOST_DEPTH for number in numbers)
    if blocks > MOST_DEPTH:
        raise DataError(f"it has blocks of numbers beyond {MOST_DEPTH}", where=where,
                        hint="fetch the file again; is this another model?")  # fmt: skip
    if not width or width > MOST_WIDTH:
        raise DataError(f"its tokens have {width:,} channels", where=where, hint="is this another model?")
    known = SHAPES.get(width)
    heads = stated.heads or (known.heads if known else 0)
    if not heads or width % heads:
        raise DataError(f"how many attention heads a width of {width} is cut into, the file does not say", where=where,
                        hint="--heads NUMBER, a divisor of the width")  # fmt: skip
    depth = stated.depth or (known.depth if known else blocks)
    return Shape(width, depth, heads, mlp_ratio)


def _grid(patches: int, patch: int, native: Size | None, where: str) -> tuple[int, int]:
    """(rows, columns) of a position table; the references' `h = int(sqrt(N * ratio)); w = h // ratio`."""
    for ratio in RATIOS:
        rows = math.isqrt(max(patches, 0) * ratio)
        if rows and rows % ratio == 0 and rows * (rows // ratio) == patches:
            return rows, rows // ratio
    if native and (native[0] // patch) * (native[1] // patch) == patches:
        return native[0] // patch, native[1] // patch
    raise DataError(f"a position table of {patches} patches fits no image of height : width "
                    f"{', '.join(f'{ratio} : 1' for ratio in sorted(RATIOS))}", where=where,
                    hint="import it with --native HEIGHT WIDTH; overlapping patches are not supported")  # fmt: skip


def _identities(aside: Mapping[str, Any]) -> dict[str, int]:
    """How many people the classifier of fine-tuned weights tells apart."""
    classifier = aside.get("classifier.weight")
    return {"identities": len(classifier)} if isinstance(classifier, Tensor) else {}


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of that training worth quoting, as far as they are plain values."""
    given = content.get("args")
    settings = vars(given) if isinstance(given, Arguments) else given if isinstance(given, dict) else {}
    return {key: settings[key] for key in ARGUMENTS if isinstance(settings.get(key), str | int | float)}
