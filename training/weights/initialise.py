"""Where a run starts from: weights published by others or exported by an earlier run, in student and teacher alike."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datapipe.core.config import Statistics, StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.core.settings import settings
from datapipe.storage import open_store, split_url
from datapipe.views.normalisation import MEAN_STD
from training.methods.base import Method
from training.nn.vision_transformer import BackboneConfig, Shape, VisionTransformer
from training.weights.counted_keys import first_few, load_counted
from training.weights.export import CARD, load_backbone, load_card
from training.weights.published import Network, PublishedWeights, Stated, read_published
from training.weights.resize_positions import Interpolation, resized, resizing

CENTRES = {"center": "centre_cls", "center2": "centre_patch"}
"""Names in DINO's and iBOT's files -> ours; PASS's have the tokens' names."""
NETWORKS: tuple[Network, ...] = ("student", "teacher")
FRESH = re.compile(r"part_token\d+|part\d+_pos|masked_embed")
"""What a backbone may have that the weights have not; it starts as in a run from nothing."""


@settings
class InitConfig:
    """What a run starts from."""

    weights: str = ""
    """Folder of an export or import, or a file of published weights, local or s3://bucket/prefix/name. Must stay where
    it is while the run lasts. Every process reads all of it, so import a training checkpoint of gigabytes first. Empty:
    random weights."""
    network: Literal["teacher", "student", "both"] = "teacher"
    """Which network of a training checkpoint student and teacher both start from. "both": each from its own, to go on
    with that training; the file is read twice."""
    positions: Interpolation = "bicubic"
    """How position tables are resized: "bicubic" to go on with pre-training, "bilinear" for fine-tuning, both as the
    references do."""
    heads: bool = False
    """Take the projection heads too, from a training checkpoint of the same method with heads of the same shape; and
    the centres of the loss, where the checkpoint and the recipe have them."""


def refuse_missing(init: InitConfig, storage: StorageConfig) -> None:
    """Raises NotFoundError where there is nothing to start from; reads nothing."""
    folder, name = split_url(init.weights)
    if not _is_export(init, storage) and not open_store(folder, storage).exists(name):
        raise NotFoundError("there are no weights to start from", where=init.weights,
                            hint="init.weights: an export's folder or a file")  # fmt: skip


def start_from(
    method: Method,
    init: InitConfig,
    backbone: BackboneConfig,
    storage: StorageConfig,
    *,
    statistics: Statistics = "imagenet",
) -> dict[str, Any]:
    """Fill a fresh method's backbones, and heads if asked for. What the weights are, which parameters stay fresh, and
    whether `statistics`, which the run normalises with, are others than those of the weights' training.

    Positions are resized as for views of another size. A position of CLS that lies in the common table becomes PASS's
    own, and the other way round. Raises DataError, ConfigError.
    """
    networks = method.networks()
    wanted: dict[str, Network] = {
        name: name if init.network == "both" else init.network for name in NETWORKS if name in networks
    }
    sources = {name: _read(init, name, backbone, storage) for name in sorted(set(wanted.values()))}
    fresh: set[str] = set()
    for name, network in networks.items():
        fresh |= _start(network, sources[wanted[name]], init, backbone)
    source = sources[wanted["student"]]
    moved = resizing(source.backbone.config.size, backbone.size, init.positions)
    about = {**source.origin, **moved, "heads": init.heads, "fresh": sorted(fresh)}
    if init.network == "both":
        about["network"] = "both"
    if source.statistics != statistics:
        about["normalised"] = [source.statistics, statistics]
    return about | ({"centres": _take_centres(method, source.centres, init.weights)} if init.heads else {})


def in_words(origin: Mapping[str, Any]) -> str:
    """One line for the log."""
    fresh = f"; fresh: {first_few(origin['fresh'])}" if origin["fresh"] else ""
    which = {"both": "; student and teacher each from its own", "": ""}.get(
        origin.get("network", ""), f"; student and teacher from its {origin.get('network')}"
    )
    centres = f"; centres of the loss: {origin['centres']}" if origin.get("centres") else ""
    normalised = ("; its images were normalised with {!r}, this run's are with {!r} (views.statistics)".format(
        *origin["normalised"]) if origin.get("normalised") else "")  # fmt: skip
    start = f"starts from {origin['file']} ({origin['layout']}, sha256 {origin['sha256'][:12]})"
    return f"{start}{which}{fresh}{centres}{normalised}"


def _start(network: nn.Module, source: PublishedWeights, init: InitConfig, backbone: BackboneConfig) -> set[str]:
    """Fill one network. The names of what stays fresh."""
    _refuse_another_architecture(source.backbone.config, backbone, init.weights)
    assert isinstance(network.backbone, VisionTransformer)
    tensors = _by_name(resized(source.backbone, backbone.size, init.positions), source.aside)
    if init.heads and isinstance(getattr(network, "head", None), nn.Module):
        _fill_head(network.get_submodule("head"), source.aside, where=init.weights)
    return _fill(network.backbone, tensors, where=init.weights)


def _take_centres(method: Method, tensors: Mapping[str, Tensor], where: str) -> str:
    """Fill the centres of the loss. What became of them, in words; empty: the recipe has none."""
    own = method.centres()
    given = {CENTRES.get(name, name.replace("center_", "centre_")): tensor for name, tensor in tensors.items()}
    if not own:
        return ""
    if not given:
        return "from zero, the file has none"
    sizes, found_sizes = ({name: one.numel() for name, one in kind.items()} for kind in (own, given))
    if wrong := sorted({name for name, _ in sizes.items() ^ found_sizes.items()}):
        raise DataError(f"the centres of the loss do not fit: {first_few(wrong)}", where=where,
                        hint="init.heads = false, or the method that the checkpoint is of")  # fmt: skip
    for name, buffer in own.items():
        buffer.copy_(given[name].reshape(buffer.shape))
    return "taken"


def _is_export(init: InitConfig, storage: StorageConfig) -> bool:
    return open_store(init.weights, storage).exists(CARD)


def _read(init: InitConfig, network: Network, backbone: BackboneConfig, storage: StorageConfig) -> PublishedWeights:
    if not _is_export(init, storage):
        stated = Stated(network=network, heads=backbone.shape.heads, depth=backbone.shape.depth,
                        size=backbone.size)  # fmt: skip
        published = read_published(init.weights, storage, stated)
        if init.network == "both" and not published.origin["network"]:
            raise ConfigError("this file holds one network, not a student and its teacher", where=init.weights,
                              hint='init.network = "teacher"')  # fmt: skip
        return published
    if init.network == "both":
        raise ConfigError("an export holds one network, not a student and its teacher", where=init.weights,
                          hint='init.network = "teacher"')  # fmt: skip
    store = open_store(init.weights, storage)
    card = load_card(store)
    origin = {"file": split_url(init.weights)[1], "sha256": card["file"]["sha256"], "layout": "export"}
    origin |= {key: card[key] for key in ("method", "manifest", "licence", "samples", "origin") if key in card}
    origin |= {key: card[key] for key in ("notes", "trained_on") if card.get(key)}
    normalised = tuple(tuple(card["input"][key]) for key in ("mean", "std"))
    named: dict[Any, Statistics] = {value: name for name, value in MEAN_STD.items()}
    return PublishedWeights(load_backbone(store), {}, origin, named.get(normalised, "imagenet"))


def _refuse_another_architecture(stored: BackboneConfig, wanted: BackboneConfig, where: str) -> None:
    for name in ("shape", "patch", "stem", "layer_scale"):
        theirs, ours = getattr(stored, name), getattr(wanted, name)
        if name == "layer_scale":  # what it began with leaves no trace, only whether there is one
            theirs, ours = theirs > 0, ours > 0
        if theirs != ours:
            raise ConfigError(f"the weights have {name} {_plain(theirs)}, the recipe {_plain(ours)}", where=where,
                              hint="make [backbone] of the recipe what the weights are")  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, Shape):
        return ", ".join(f"{key} {number:g}" for key, number in value._asdict().items())
    return str(value)


def _by_name(source: VisionTransformer, aside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors, those of CLS' position in both forms, and its mask token where the file has one."""
    tensors = dict(source.state_dict())
    if source.parts:
        tensors["cls_and_patch_pos"] = torch.cat([tensors["cls_pos"], tensors["pos_embed"]], dim=1)
    else:
        tensors["cls_and_patch_pos"] = tensors["pos_embed"]
        tensors["cls_pos"], tensors["pos_embed"] = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
    masks = [tensor for name, tensor in aside.items() if name.endswith("masked_embed")]
    return tensors | ({"masked_embed": masks[0]} if masks else {})


def _fill(backbone: VisionTransformer, tensors: Mapping[str, Tensor], *, where: str) -> set[str]:
    """Load what there is for the backbone. The names of what stays fresh."""
    own = backbone.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    if backbone.parts == 0:
        given["pos_embed"] = tensors["cls_and_patch_pos"]
    fresh = {name for name in own.keys() - given.keys() if FRESH.fullmatch(name)}
    load_counted(backbone, given | {name: own[name] for name in fresh}, where=where)
    return fresh


def _fill_head(head: nn.Module, aside: Mapping[str, Tensor], *, where: str) -> None:
    tensors = {name.removeprefix("head."): tensor for name, tensor in aside.items() if name.startswith("head.")}
    if not tensors:
        raise ConfigError("these weights have no projection heads", where=where, hint="init.heads = false")
    own = head.state_dict()
    shared = {name for name, tensor in tensors.items() if name not in own and _is_shared(name, tensors)}
    load_counted(head, tensors, leave_out=shared, where=where)


def _is_shared(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """iBOT lists a shared last layer a second time, as last_layer2."""
    first = tensors.get(name.replace("last_layer2.", "last_layer."))
    return "last_layer2." in name and first is not None and torch.equal(first, tensors[name])
