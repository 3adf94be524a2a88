"""A data set cut into pieces of neighbouring images, each of which is worked on alone, on any machine.

A labelled data set is cut within its parts; shards of any size are cut within each shard, and only what a piece needs
is read: the index of its shard, and the crops a block at a time.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.index import Shard, read_index
from datapipe.dataset.manifest import Manifest, has_manifest
from datapipe.storage import is_remote, open_store
from datapipe.stream.block_reader import BlockReader, Places
from datapipe.stream.memory_cache import MemoryCache
from training.reid.datasets.image_stores import ImageStore, open_source
from training.reid.datasets.open_dataset import ReIDSet, open_reid

PIECE_IMAGES = 4_096
"""Images of a piece, about: a multiple of the batch."""
BLOCK, READS, CACHE_BYTES = 256, 8, 128 << 20
"""Crops that are read together, requests at a time to object storage, bytes of crops that are held."""
LABELS = pyarrow.schema(
    [
        ("key", pyarrow.string()),  # 32 hex digits: the crop's key in its shards; of loose files the path
        ("name", pyarrow.string()),  # of a crop its original name; of loose files the path below the data set's root
        ("pid", pyarrow.int32()),  # identity as the data set numbers it; -1: unknown
        ("camera", pyarrow.int16()),  # from 1; -1: unknown
        ("part", pyarrow.string()),  # query, gallery or train; null: the data set does not say
    ]
)
"""What is known of each image of a piece."""
PART_OF_FOLDER = {
    "query": "query", "gallery": "gallery", "bounding_box_test": "gallery", "train": "train",
    "bounding_box_train": "train",
}  # fmt: skip
"""First folder in the name of a crop in shards -> part of the data set."""
INDEXED = ("key", "name", "pid", "camera", "removed", "offset", "size", "xxh3")


class OpenPiece(NamedTuple):
    """A piece that is at hand."""

    labels: pyarrow.Table
    """LABELS, a row for each image, in the order of `ids`."""
    ids: list[str]
    """What `read` takes."""
    read: Callable[[str], bytes]
    """The bytes of an image. Raises DataError or StorageError that name it."""


class Piece(Protocol):
    """Neighbouring images of a data set. Picklable, and small."""

    @property
    def number(self) -> int:
        """Place among the pieces of the data set, from 0."""

    def open(self) -> AbstractContextManager[OpenPiece]:
        """The images of the piece, for as long as the context lasts."""


class CutDataSet(NamedTuple):
    """All of a data set."""

    pieces: Sequence[Piece]
    images: int
    """How many there are, about: crops that were taken out of their shard may be among them."""
    about: dict[str, Any]
    """For files of results: address, name, id of the manifest, counts."""
    identity: str
    """Equal where images, order and labels are."""


@dataclass(frozen=True)
class LabelledPiece:
    """Some images of one part of a labelled data set."""

    number: int
    url: str
    storage: StorageConfig
    part: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    pids: tuple[int, ...]
    cameras: tuple[int, ...]
    """From 1."""

    @contextmanager
    def open(self) -> Iterator[OpenPiece]:
        columns = [self.keys, self.paths, self.pids, self.cameras, [self.part] * len(self.paths)]
        labels = pyarrow.table(dict(zip(LABELS.names, columns, strict=True)), LABELS)
        yield OpenPiece(labels, list(self.paths), _source(self.url, self.storage).read)


@lru_cache(maxsize=1)
def _source(url: str, storage: StorageConfig) -> ImageStore:
    """Opened once in a process: shards have their indexes read."""
    return open_source(url, storage)


@dataclass(frozen=True)
class CropPiece:
    """Some rows of one shard."""

    number: int
    url: str
    storage: StorageConfig
    shard: Shard
    rows: tuple[int, ...] | range
    """Numbers within the shard, ascending."""

    @contextmanager
    def open(self) -> Iterator[OpenPiece]:
        store = open_store(self.url, self.storage)
        table = read_index(store, self.shard, INDEXED).take(pyarrow.array(self.rows, pyarrow.int64()))
        table = table.filter(pyarrow.compute.invert(table["removed"]))
        offset, size, xxh3 = (table[name].to_numpy() for name in ("offset", "size", "xxh3"))
        places = Places((self.shard,), np.array([0, len(table)]), offset, size, xxh3)
        in_flight = READS if is_remote(self.url) else 0
        reader = BlockReader(store, places, block=BLOCK, cache=MemoryCache(CACHE_BYTES), in_flight=in_flight)
        keys = table["key"].to_pylist()
        row_of_key = {key: row for row, key in enumerate(keys)}
        parts = [PART_OF_FOLDER.get(name.partition("/")[0]) if "/" in name else None
                 for name in table["name"].to_pylist()]  # fmt: skip
        labels = table.select(LABELS.names[:-1]).append_column(LABELS.field("part"), pyarrow.array(parts, "string"))
        try:
            yield OpenPiece(labels, keys, lambda key: reader.read_checked(row_of_key[key], key))
        finally:
            reader.close()


def cut(
    url: str, storage: StorageConfig, *, batch: int, data_name: str = "", allow_partial: bool = False
) -> CutDataSet:
    """The pieces of what lies there: of shards with a manifest all crops of that version, whatever they are; else of a
    labelled data set all images of its parts, junk left out.

    Every piece but the last of a part or shard is a multiple of `batch`, so that the batches are those of one pass over
    the part. Errors: those of `Manifest.load` and `open_reid`.
    """
    images = max(1, PIECE_IMAGES // batch) * batch
    if url.endswith(".json") or has_manifest(open_store(url, storage)):
        return _cut_shards(Manifest.load(url, storage), storage, images)
    return _cut_labelled(open_reid(url, storage, name=data_name, allow_partial=allow_partial), url, storage, images)


def cut_shards(url: str, storage: StorageConfig, *, batch: int) -> CutDataSet:
    """The pieces of a version of a data set in shards. Raises DataError for what is no such thing, as `Manifest.load`
    does."""
    return _cut_shards(Manifest.load(url, storage), storage, max(1, PIECE_IMAGES // batch) * batch)


def _cut_shards(manifest: Manifest, storage: StorageConfig, images: int) -> CutDataSet:
    if not manifest.rows:
        raise DataError("the data set holds no crops", where=manifest.url, hint="look at its quarantine.parquet")
    pieces: list[Piece] = []
    for ordinal, chosen in manifest.rows_of_shards(storage).items():
        shard = manifest.shards[ordinal]
        rows = range(shard.rows) if chosen is None else tuple(chosen.tolist())
        for start in range(0, len(rows), images):
            pieces.append(CropPiece(len(pieces), manifest.url, storage, shard, rows[start : start + images]))
    about = {
        "address": manifest.url,
        "name": manifest.name,
        "manifest": manifest.id,
        "file": manifest.file,
        "licence": manifest.licence,
        "notes": list(manifest.notes),
        "crops": manifest.rows,
    }
    return CutDataSet(pieces, manifest.rows, about, manifest.id)


def _cut_labelled(reid: ReIDSet, url: str, storage: StorageConfig, images: int) -> CutDataSet:
    pieces: list[Piece] = []
    digest = hashlib.sha256()
    for name, part in reid.parts.items():
        paths, pids, cameras = part.paths.tolist(), part.pids.tolist(), (part.cameras + 1).tolist()
        keys = reid.images.keys(paths)
        digest.update(repr((name, list(zip(paths, keys, pids, cameras, strict=True)))).encode())
        for start in range(0, len(paths), images):
            columns = (tuple(column[start : start + images]) for column in (paths, keys, pids, cameras))
            pieces.append(LabelledPiece(len(pieces), url, storage, name, *columns))
    about = {"address": url, **reid.about(), "images": sum(map(len, reid.parts.values()))}
    return CutDataSet(pieces, about["images"], about, digest.hexdigest())
