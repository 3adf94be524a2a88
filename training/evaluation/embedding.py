"""Features of all images of a data set by one set of weights, in one parquet file for other tools.

plan -> each piece that is not there yet: embed, write -> one file of all pieces -> pieces deleted

Killed at any moment and started again, it goes on with the pieces that are missing. Who carries out the pieces, and on
which device, the caller says: processes of this machine, or those of a cluster.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.core.parallel import Executor
from datapipe.storage import open_store, split_url
from datapipe.views.normalisation import MEAN_STD, Triple
from training.evaluation import evaluation, feature_file, weights_origin
from training.evaluation.evaluation import ScoringTask, Subject
from training.evaluation.image_pieces import CutDataSet, Piece, cut
from training.evaluation.piece_files import PieceFiles
from training.nn.identity.necks import FEATURE, NeckedBackbone
from training.nn.vision_transformer import VisionTransformer
from training.reid.embed import EmbedConfig, embed, feature_widths
from training.reid.settings import ScoringConfig
from training.reid.zero_shot import Weights
from training.weights import export as exports
from training.weights.export import CARD, Provenance
from training.weights.published import Stated, read_published
from training.weights.safe_load import is_weights_file

PIECES = ".pieces-"
"""Between the file's name and the identity of its content, in the name of the folder of finished pieces beside it."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Which images are to be embedded, and how many at once. Picklable, and hashable."""

    data: str
    """Shards, or a labelled data set."""
    storage: StorageConfig
    batch: int = 64
    threads: int = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def embed_config(self, *, interpolation: Literal["bilinear", "bicubic"], mean: Triple, std: Triple) -> EmbedConfig:
        """Settings of embedding images that are resized and normalised so."""
        return EmbedConfig(interpolation=interpolation, mean=mean, std=std, batch=self.batch, threads=self.threads,
                           precision=self.precision)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EmbedRequest(ImageRequest):
    """What is to be embedded, and with what. Picklable, and hashable."""

    weights: str
    """Run (its newest checkpoint), checkpoint, export or import, file of published weights."""
    feature: str = ""
    """Empty: the one that the method quotes."""
    dtype: Literal["float32", "float16"] = "float32"


class EmbedTask(NamedTuple):
    """One piece of the work. Picklable."""

    request: EmbedRequest
    header: dict[str, Any]
    files: PieceFiles
    piece: Piece


class EmbedPlan(NamedTuple):
    """The work, before any of it is done."""

    request: EmbedRequest
    """With the checkpoint and the feature that are meant."""
    header: dict[str, Any]
    """What the file will say of itself."""
    data: CutDataSet
    out: str
    files: PieceFiles

    def task(self, piece: Piece) -> EmbedTask:
        """The work on one piece."""
        return EmbedTask(self.request, self.header, self.files, piece)


def plan(request: EmbedRequest, out: str, *, data_name: str = "", allow_partial: bool = False) -> EmbedPlan | None:
    """Look at weights and data, and what of the work is there; None: the file is there already, made of the same.

    Raises ConfigError for a feature that the weights do not have, DataError where `out` is another file, and what is
    wrong with weights and data.
    """
    pinned = pinned_weights(request.weights, request.storage)
    subject, backbone = loaded(pinned, request.data, request.storage, request.batch, "cpu")
    feature = request.feature or subject.headline
    widths = widths_of(backbone)
    if feature not in widths:
        raise ConfigError(f"these weights have no feature {feature}", where="--feature",
                          hint=f"they have {', '.join(widths)}")  # fmt: skip
    request = replace(request, weights=pinned, feature=feature)
    data = cut(request.data, request.storage, batch=request.batch, data_name=data_name, allow_partial=allow_partial)
    header: dict[str, Any] = {
        "format": feature_file.FORMAT,
        "weights": origin_of(subject, pinned),
        "feature": feature,
        "channels": widths[feature],
        "dtype": request.dtype,
        "normalised": False,
        "size": list(backbone.config.size),
        "interpolation": subject.embed.interpolation,
        "mean": list(subject.embed.mean),
        "std": list(subject.embed.std),
        "precision": request.precision,
        "data": data.about,
    }
    facts = {name: value for name, value in header.items() if name not in ("weights", "data")}
    header["identity"] = digest(facts, subject.identity, data.identity, request.batch, len(data.pieces))
    if feature_file.refuse_other(out, request.storage, header["identity"]):
        return None
    folder, name = split_url(out)
    files = PieceFiles(open_store(folder, request.storage), f"{name}{PIECES}{header['identity']}")
    return EmbedPlan(request, header, data, out, files)


def widths_of(network: VisionTransformer | NeckedBackbone) -> dict[str, int]:
    """The features that `embed` gives of a network, and the length of each."""
    if isinstance(network, NeckedBackbone):
        return network.feature_widths()
    return feature_widths(network.width, network.parts)


def digest(*facts: Any) -> str:
    """16 hex digits that are equal where the facts are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def origin_of(subject: Subject, address: str) -> dict[str, Any]:
    """What a file says of the weights it was made with: name, address, how far they were trained, origin."""
    assert subject.origin is not None
    name, step, samples = subject.weights.name, subject.weights.step, subject.weights.samples
    return {"name": name, "address": address, "step": step, "samples": samples, **subject.origin.to_tree()}


def carry_out(plan: EmbedPlan, executor: Executor, work: Callable[..., int], device: torch.device | str) -> int:
    """Embed what is missing by `work(task, device)`, which is `embed_piece` or calls it, and make the file; its
    rows."""
    names = plan.files.carry_out(plan.data, executor, work, plan.task, device, label="embed")
    columns = feature_file.schema(plan.header)
    rows = feature_file.merge(plan.files.store, names, plan.out, plan.request.storage, columns)
    plan.files.clear()
    return rows


def embed_piece(task: EmbedTask, device: torch.device | str = "cpu") -> int:
    """Embed one piece and write its file; its images. The weights stay in the process for the next one."""
    request, header = task.request, task.header
    _, backbone = loaded(request.weights, request.data, request.storage, request.batch, str(device))
    config = request.embed_config(interpolation=header["interpolation"], mean=tuple(header["mean"]),
                                  std=tuple(header["std"]))  # fmt: skip
    with task.piece.open() as images:
        features = np.empty((0, header["channels"]), np.float32)
        if images.ids:
            found = embed(backbone, images.ids, images.read, size=backbone.config.size, device=device, config=config,
                          label=f"piece {task.piece.number + 1}")  # fmt: skip
            features = found[request.feature]
        rows = feature_file.table(images.labels, features, header)
        task.files.store.replace(task.files.name(task.piece), feature_file.serialised(rows))
    return len(images.ids)


# ----------------------------------------------------------------------------------------------------------- weights


def pinned_weights(address: str, storage: StorageConfig) -> str:
    """The address of exactly these weights: of a run's newest complete checkpoint, if a run is given; of the folder, if
    the file of an export is."""
    folder, name = split_url(address)
    if name == exports.WEIGHTS and open_store(folder, storage).exists(CARD):
        return folder
    if is_weights_file(address):
        return address
    run, found = evaluation.weights_at(address, storage)
    return run if found[-1].name == evaluation.EXPORTED else f"{run.rstrip('/')}/checkpoints/{found[-1].name}"


def subject_at(address: str, data: str, storage: StorageConfig, *, batch: int) -> Subject:
    """The one set of weights at a pinned address, as an evaluation on `data` would take it."""
    if is_weights_file(address):
        return _published(address, data, storage, batch)
    run, found = evaluation.weights_at(address, storage)
    task = ScoringTask(run, data, found[-1], storage, ScoringConfig(embed_batch=batch))
    return evaluation.subject_of(task, threads=1)


def _published(file: str, data: str, storage: StorageConfig, batch: int) -> Subject:
    """A file that others published: what `evaluate` imports it as."""
    published = read_published(file, storage, Stated())
    mean, std = MEAN_STD[published.statistics]
    _, card = exports.serialised(published.backbone, Provenance(origin=published.origin, mean=mean, std=std))
    necks = published.necks
    network = published.backbone if necks is None else NeckedBackbone(published.backbone, necks)
    return Subject(
        Weights(split_url(file)[1].rpartition(".")[0]), card["file"]["sha256"], weights_origin.of_card(card, data),
        EmbedConfig(mean=mean, std=std, batch=batch),
        weights_origin.quoted_feature(card) if necks is None else FEATURE, network.eval,
    )  # fmt: skip


@lru_cache(maxsize=2)
def loaded(
    address: str, data: str, storage: StorageConfig, batch: int, device: str
) -> tuple[Subject, VisionTransformer | NeckedBackbone]:
    """Weights at a pinned address, ready on a device: loaded once in a process."""
    subject = subject_at(address, data, storage, batch=batch)
    return subject, subject.load().to(device)
