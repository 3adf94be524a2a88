"""Catastrophic forgetting scores: how much of its features of a crop a network keeps when it is fine-tuned elsewhere.

    c(x) = <f_s(x), f_t(x)> / (|f_s(x)| |f_t(x)|)

f_s: the network as pre-training on the source left it; f_t: the same after supervised fine-tuning on the target. A crop
with a high score is close to the target; pre-training again on the first part of the list, best first, is what
TransReID-SSL does (Luo et al., 2021: 60 % of LUPerson). Which feature, size of images, normalisation and target set its
authors took is not published: all are settings here, and stated in the file.

    OUT/scores.cfs.parquet     key, name, score of every crop, best first; with what it is made of in its metadata
    OUT/names.txt              the names alone, and names.txt.notes.json, what binds whoever uses them
    OUT/pieces-<id>/           finished pieces while it is being made
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from numpy.typing import NDArray

from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.core.parallel import Executor
from datapipe.maintain.read_list import NOTES, SIDECAR
from datapipe.storage import Store, open_store
from datapipe.views.normalisation import MEAN_STD
from training.evaluation import feature_file
from training.evaluation.embedding import ImageRequest, digest, loaded, origin_of, pinned_weights, widths_of
from training.evaluation.image_pieces import LABELS, CutDataSet, Piece, cut_shards
from training.evaluation.piece_files import PieceFiles
from training.nn.identity.necks import NeckedBackbone
from training.nn.vision_transformer import VisionTransformer
from training.reid.embed import Network, embed_each
from training.weights.counted_keys import first_few

SCORES, NAMES = "scores.cfs.parquet", "names.txt"
METADATA = b"reid_cfs"
FORMAT = 1
COLUMNS = pyarrow.schema([LABELS.field("key"), LABELS.field("name"), pyarrow.field("score", pyarrow.float64())])
GROUP_ROWS = 1 << 16
"""Rows of the sorted file that are written together."""


@dataclass(frozen=True, kw_only=True)
class ForgettingRequest(ImageRequest):
    """Two networks, the crops, and how both see them. Picklable, and hashable."""

    source: str
    """Weights as pre-training left them."""
    target: str
    """The same network after fine-tuning."""
    feature: str = "cls"
    size: Size | None = None
    """(height, width) for both; None: each network's own."""
    source_statistics: Statistics = "imagenet"
    target_statistics: Statistics = "half"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class ForgettingTask(NamedTuple):
    """One piece of the work. Picklable."""

    request: ForgettingRequest
    files: PieceFiles
    piece: Piece


class ForgettingPlan(NamedTuple):
    """The work, before any of it is done."""

    request: ForgettingRequest
    header: dict[str, Any]
    """What the file will say of itself."""
    data: CutDataSet
    out: Store
    files: PieceFiles

    def task(self, piece: Piece) -> ForgettingTask:
        """The work on one piece."""
        return ForgettingTask(self.request, self.files, piece)


def forgetting_scores(source: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N]: the cosine of the two features [N, C] of each image, in double precision; not a number where one of them
    is, or is zero."""
    source, target = source.astype(np.float64), target.astype(np.float64)
    norms = np.linalg.norm(source, axis=1) * np.linalg.norm(target, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: NDArray[np.float64] = np.einsum("nc,nc->n", source, target) / norms
    return cosines


def best_first(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """[N]: images from the highest score to the lowest; equal ones as they came."""
    return np.argsort(-scores, kind="stable")


def plan(request: ForgettingRequest, out: str, *, tuned_on: str = "") -> ForgettingPlan | None:
    """Look at both networks and the data; None: the scores are there already, made of the same.

    `tuned_on`: the labelled data that the target was fine-tuned on; empty: as its weights say. Raises ConfigError where
    the networks are of different architectures, where nothing says what the target was fine-tuned on, and for a feature
    that they do not have; DataError where other scores are in the folder.
    """
    request = replace(request, source=pinned_weights(request.source, request.storage),
                      target=pinned_weights(request.target, request.storage))  # fmt: skip
    (first, source), (second, target) = (
        loaded(weights, request.data, request.storage, request.batch, "cpu")
        for weights in (request.source, request.target)
    )
    _refuse_different(source, target, request)
    features = [name for name in widths_of(source) if name in widths_of(target)]
    if request.feature not in features:
        raise ConfigError(f"these networks have no feature {request.feature}", where="--feature",
                          hint=f"they have {', '.join(features)}")  # fmt: skip
    assert second.origin is not None
    tuned_on = tuned_on or second.origin.trained_on
    if not tuned_on:
        raise ConfigError("nothing says which labelled data the target was fine-tuned on", where=request.target,
                          hint="--tuned-on market1501: the list binds whoever trains on what it selects")  # fmt: skip
    data = cut_shards(request.data, request.storage, batch=request.batch)
    header: dict[str, Any] = {
        "format": FORMAT,
        "score": "catastrophic forgetting score: cosine of the features of source and target",
        "source": origin_of(first, request.source) | _seen(source, request, request.source_statistics),
        "target": origin_of(second, request.target) | _seen(target, request, request.target_statistics),
        "tuned_on": tuned_on,
        "feature": request.feature,
        "interpolation": request.interpolation,
        "precision": request.precision,
        "data": data.about,
    }
    how = (request.feature, request.size, request.source_statistics, request.target_statistics, request.interpolation,
           request.precision, request.batch)  # fmt: skip
    header["identity"] = digest(FORMAT, how, first.identity, second.identity, tuned_on, data.identity, len(data.pieces))
    store = open_store(out, request.storage)
    if _is_there(store, header["identity"], request.storage):
        return None
    return ForgettingPlan(request, header, data, store, PieceFiles(store, f"pieces-{header['identity']}"))


def _seen(
    network: VisionTransformer | NeckedBackbone, request: ForgettingRequest, statistics: Statistics
) -> dict[str, Any]:
    mean, std = MEAN_STD[statistics]
    return {"size": list(request.size or network.config.size), "mean": list(mean), "std": list(std)}


def _refuse_different(
    source: VisionTransformer | NeckedBackbone, target: VisionTransformer | NeckedBackbone, request: ForgettingRequest
) -> None:
    """Raises ConfigError where the two cannot be one network at two times."""
    one, other = (
        {"stem": network.config.stem, "patch": network.config.patch, "part tokens": network.parts,
         **{name: getattr(network.config.shape, name) for name in ("width", "depth", "heads", "mlp_ratio")}}
        for network in (source, target)
    )  # fmt: skip
    different = [f"{name} {one[name]} and {other[name]}" for name in one if one[name] != other[name]]
    if different:
        raise ConfigError(
            f"source and target are of different architectures: {', '.join(different)}",
            where=f"{request.source}, {request.target}",
            hint="the target is the source after fine-tuning: give both of one network",
        )


def _is_there(store: Store, identity: str, storage: StorageConfig) -> bool:
    """Whether these scores are in the folder; DataError where others are."""
    if not store.exists(SCORES):
        return False
    with feature_file.opened(store.address(SCORES), storage) as file:
        said = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
    if said.get("identity") != identity:
        raise DataError("other scores are already there, of other weights, data or settings",
                        where=store.address(SCORES), hint="choose another --out, or delete that folder")  # fmt: skip
    return True


def score_piece(task: ForgettingTask, device: torch.device | str = "cpu") -> int:
    """Score one piece and write its file; its images. Each crop is decoded once, and seen by both networks."""
    request = task.request
    networks = []
    for weights, statistics in ((request.source, request.source_statistics),
                                (request.target, request.target_statistics)):  # fmt: skip
        _, backbone = loaded(weights, request.data, request.storage, request.batch, str(device))
        mean, std = MEAN_STD[statistics]
        config = request.embed_config(interpolation=request.interpolation, mean=mean, std=std)
        networks.append(Network(backbone, request.size or backbone.config.size, config))
    with task.piece.open() as images:
        scores = np.empty(0)
        if images.ids:
            source, target = embed_each(networks, images.ids, images.read, device=device,
                                        label=f"piece {task.piece.number + 1}")  # fmt: skip
            scores = forgetting_scores(source[request.feature], target[request.feature])
            _refuse_no_numbers(scores, images.ids, request)
        rows = pyarrow.table([images.labels["key"], images.labels["name"], pyarrow.array(scores)], schema=COLUMNS)
        task.files.store.replace(task.files.name(task.piece), feature_file.serialised(rows))
    return len(images.ids)


def _refuse_no_numbers(scores: NDArray[np.float64], ids: list[str], request: ForgettingRequest) -> None:
    bad = [ids[row] for row in np.flatnonzero(~np.isfinite(scores)).tolist()]
    if bad:
        raise DataError(f"{len(bad):,} of {len(ids):,} scores are not finite, of the crops {first_few(bad)}",
                        where=f"{request.source}, {request.target}",
                        hint="weights may be broken, or the precision too low: --precision fp32")  # fmt: skip


def carry_out(
    plan: ForgettingPlan, executor: Executor, work: Callable[..., int], device: torch.device | str
) -> tuple[int, tuple[str, ...]]:
    """Score what is missing by `work(task, device)`, which is `score_piece` or calls it, and write the sorted list; its
    rows, and the notes that it carries. All scores are in memory once, about 100 bytes each."""
    names = plan.files.carry_out(plan.data, executor, work, plan.task, device, label="score")
    parts = [pyarrow.parquet.read_table(pyarrow.BufferReader(plan.files.store.read(name))) for name in names]
    large = [(name, pyarrow.large_string()) for name in ("key", "name")]
    table = pyarrow.concat_tables(parts).cast(pyarrow.schema([*large, COLUMNS.field("score")])).combine_chunks()
    table = table.take(pyarrow.array(best_first(table["score"].to_numpy())))
    notes = (note(plan.header),)
    said = {METADATA: json.dumps(plan.header).encode(), NOTES: json.dumps(notes).encode()}
    _write_names(plan.out, table["name"], notes)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata(said), sink, compression="zstd", use_dictionary=False,
                                row_group_size=GROUP_ROWS)  # fmt: skip
    plan.out.replace(SCORES, memoryview(sink.getvalue()))
    plan.files.clear()
    return len(table), notes


def _write_names(out: Store, names: pyarrow.ChunkedArray, notes: tuple[str, ...]) -> None:
    out.replace(f"{NAMES}{SIDECAR}", (json.dumps(notes, indent=1) + "\n").encode())
    out.replace(NAMES, "".join(f"{name}\n" for name in names.to_pylist()).encode())


def note(header: dict[str, Any]) -> str:
    """What binds whoever uses the list, in a sentence."""
    return (f"selected with labelled data: by catastrophic forgetting scores of a network fine-tuned on "
            f"{header['tuned_on']}; what is trained on it is not self-supervised alone")  # fmt: skip
