"""Where a run starts from: weights published by others or exported by an earlier run, in student and teacher alike."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from datapipe.config import StorageConfig
from datapipe.errors import ConfigError, NotFoundError
from datapipe.settings import settings
from datapipe.storage import open_store, split_url
from training.backbone import BackboneConfig, Shape, VisionTransformer
from training.methods.base import Method
from training.published import Network, Published, Stated, read_published
from training.resizing import resized, resizing
from training.weights import CARD, first_few, load_backbone, load_card, load_counted

FRESH = re.compile(r"part_token\d+|part\d+_pos|masked_embed")
"""What a backbone may have that the weights have not; it starts as in a run from nothing."""


@settings
class InitConfig:
    """What a run starts from."""

    weights: str = ""
    """Folder of an export or import, or a file of published weights, local or s3://bucket/prefix/name. Must stay where
    it is while the run lasts. Every process reads all of it, so import a training checkpoint of gigabytes first. Empty:
    random weights."""
    network: Network = "teacher"
    """Which network of a training checkpoint. Student and teacher both start from it."""
    heads: bool = False
    """Take the projection heads too, from a training checkpoint of the same method with heads of the same shape."""


def refuse_missing(init: InitConfig, storage: StorageConfig) -> None:
    """Raises NotFoundError where there is nothing to start from; reads nothing."""
    folder, name = split_url(init.weights)
    if not _is_export(init, storage) and not open_store(folder, storage).exists(name):
        raise NotFoundError("there are no weights to start from", where=init.weights,
                            hint="init.weights: an export's folder or a file")  # fmt: skip


def start_from(method: Method, init: InitConfig, backbone: BackboneConfig, storage: StorageConfig) -> dict[str, Any]:
    """Fill a fresh method's backbones, and heads if asked for. What the weights are, and which parameters stay fresh.

    Positions are resized as for views of another size. A position of CLS that lies in the common table becomes PASS's
    own, and the other way round. Raises DataError, ConfigError.
    """
    source = _read(init, backbone, storage)
    _refuse_another_architecture(source.backbone.config, backbone, init.weights)
    pretrained = resized(source.backbone, backbone.size, "bicubic")
    networks = [network for name, network in method.named_children() if name in ("student", "teacher")]
    tensors = _by_name(pretrained, source.aside)
    fresh: set[str] = set()
    for network in networks:
        assert isinstance(network.backbone, VisionTransformer)
        fresh |= _fill(network.backbone, tensors, where=init.weights)
        if init.heads and isinstance(getattr(network, "head", None), nn.Module):
            _fill_head(network.get_submodule("head"), source.aside, where=init.weights)
    moved = resizing(source.backbone.config.size, backbone.size, "bicubic")
    return {**source.origin, **moved, "heads": init.heads, "fresh": sorted(fresh)}


def in_words(origin: Mapping[str, Any]) -> str:
    """One line for the log."""
    fresh = f"; fresh: {first_few(origin['fresh'])}" if origin["fresh"] else ""
    return f"starts from {origin['file']} ({origin['layout']}, sha256 {origin['sha256'][:12]}){fresh}"


def _is_export(init: InitConfig, storage: StorageConfig) -> bool:
    return open_store(init.weights, storage).exists(CARD)


def _read(init: InitConfig, backbone: BackboneConfig, storage: StorageConfig) -> Published:
    if not _is_export(init, storage):
        stated = Stated(network=init.network, heads=backbone.shape.heads, depth=backbone.shape.depth,
                        size=backbone.size)  # fmt: skip
        return read_published(init.weights, storage, stated)
    store = open_store(init.weights, storage)
    card = load_card(store)
    origin = {"file": split_url(init.weights)[1], "sha256": card["file"]["sha256"], "layout": "export"}
    origin |= {key: card[key] for key in ("method", "manifest", "licence", "samples", "origin") if key in card}
    return Published(load_backbone(store), {}, origin)


def _refuse_another_architecture(found: BackboneConfig, wanted: BackboneConfig, where: str) -> None:
    for name in ("shape", "patch", "stem"):
        theirs, ours = getattr(found, name), getattr(wanted, name)
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
    twice = {name for name, tensor in tensors.items() if name not in own and _is_shared(name, tensors)}
    load_counted(head, tensors, leave_out=twice, where=where)


def _is_shared(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """iBOT lists a shared last layer a second time, as last_layer2."""
    first = tensors.get(name.replace("last_layer2.", "last_layer."))
    return "last_layer2." in name and first is not None and torch.equal(first, tensors[name])
