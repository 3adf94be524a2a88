"""Where the images of a data set are read from: a folder or prefix of files, or shards made by `datapipe`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import NotFoundError
from datapipe.core.progress import QUIET_S, Progress, counted
from datapipe.core.warn_once import warn_once
from datapipe.dataset.manifest import Manifest, manifest_files
from datapipe.dataset.remarks import Remarks
from datapipe.sources.base import UNKNOWN
from datapipe.sources.location import is_hidden, is_image
from datapipe.storage import Store, open_store
from datapipe.stream.open_manifest import Opened, open_manifest

log = logging.getLogger(__name__)
READS = 16
"""Images read at once for their hashes."""
PEEKED = 1_000
"""Names that are looked at to say what lies in a folder."""
SHARDED = {
    "query": ("query",),
    "bounding_box_test": ("bounding_box_test", "gallery"),
    "bounding_box_train": ("bounding_box_train", "train"),
}
"""Folder of the Market-1501 layout -> folders that may hold its shards, where each part was sharded by itself."""


class ImageEntry(NamedTuple):
    """An image, with the identity and camera (from 1) that stand beside it, where they do."""

    path: str
    size: int
    label: tuple[int, int] | None = None


class ImageStore(ABC):
    """The images of a data set, their bytes, and the files that lie beside them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        """The root of the data set, for messages."""
        return self.store.url

    @abstractmethod
    def images(self, folder: str) -> list[ImageEntry]:
        """Every image below a folder, sorted; none where there is no such folder."""

    @abstractmethod
    def has(self, folder: str) -> bool:
        """Whether there is an image below a folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of one image. Raises DataError or StorageError that name it."""

    @abstractmethod
    def hashes(self, paths: Sequence[str]) -> NDArray[np.uint64]:
        """xxh3 of the bytes of each."""

    def keys(self, paths: Sequence[str]) -> list[str]:
        """What each image is called in the data set's own terms: the key of a crop in shards, else its path."""
        return list(paths)

    def sub_folders(self) -> list[str]:
        """Folders of the root that may hold a data set, as far as a short look finds them."""
        return []


def open_source(url: str, storage: StorageConfig) -> ImageStore:
    """Shards where there are manifests, at the root or one for each part; else a folder of files."""
    store = open_store(url, storage)
    folder_of_part = {
        part: folder for part, folders in SHARDED.items() for folder in folders if _sharded(store.at(folder))
    }
    if folder_of_part:
        parts = [(part, Manifest.load(store.address(folder), storage)) for part, folder in folder_of_part.items()]
        return ShardImages(store, parts, storage)
    if _sharded(store):
        return ShardImages(store, [("", Manifest.load(url, storage))], storage)
    return FolderImages(store)


class FolderImages(ImageStore):
    """Loose files. A folder is listed once."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._images: dict[str, list[ImageEntry]] = {}

    def images(self, folder: str) -> list[ImageEntry]:
        if folder not in self._images:
            self._images[folder] = self._list(folder)
        return self._images[folder]

    def _list(self, folder: str) -> list[ImageEntry]:
        """By the rule by which ingestion takes files for images; others are counted in the log."""
        images, remarks = [], Remarks()
        try:
            for entry in self.store.at(folder).list():
                if is_image(entry.name):
                    images.append(ImageEntry(f"{folder}/{entry.name}", entry.size))
                elif not is_hidden(entry.name):
                    remarks.pass_over(entry.name)
        except NotFoundError:
            return []
        for line in remarks.lines():
            warn_once(log, f"{self.store.address(folder)}: {line}")
        return sorted(images)

    def has(self, folder: str) -> bool:
        try:
            return any(is_image(entry.name) for entry in self.store.at(folder).list())
        except NotFoundError:
            return False

    def read(self, path: str) -> bytes:
        return self.store.read(path)

    def hashes(self, paths: Sequence[str]) -> NDArray[np.uint64]:
        with ThreadPoolExecutor(READS) as pool:
            digests = pool.map(lambda path: xxhash.xxh3_64_intdigest(self.store.read(path)), paths)
            with Progress("compare images", len(paths), unit="images", quiet_s=QUIET_S) as progress:
                return np.fromiter(progress.over(digests, lambda _: 1), np.uint64, len(paths))

    def sub_folders(self) -> list[str]:
        try:
            names = [entry.name for entry in islice(self.store.list(), PEEKED)]
        except NotFoundError:
            return []
        return sorted({name.partition("/")[0] for name in names if "/" in name})


class _Row(NamedTuple):
    """A crop of a manifest."""

    manifest: int
    row: int
    key: str
    entry: ImageEntry


class ShardImages(ImageStore):
    """Crops of tars by their original names. Those that were removed are not there."""

    def __init__(self, store: Store, manifests: Sequence[tuple[str, Manifest]], storage: StorageConfig) -> None:
        super().__init__(store)
        self._storage = storage
        self._shards = [(folder, _opened(manifest, storage)) for folder, manifest in manifests]
        for _, manifest in manifests:
            if manifest.quarantined:
                missing = counted(manifest.quarantined, "image")
                warn_once(log, f"{manifest.url}: {missing} of its sources not in these shards, quarantined: scores may "
                               "differ from those of the sources")  # fmt: skip

    @cached_property
    def _rows(self) -> dict[str, _Row]:
        """By path: the folder of the part, if it was sharded by itself; the source, if there are several; the name."""
        rows: dict[str, _Row] = {}
        for number, (folder, opened) in enumerate(self._shards):
            columns = ["key", "source", "name", "size", "pid", "camera", "removed"]
            crops = opened.manifest.table(columns, self._storage)
            several = len(crops["source"].unique()) > 1
            for row, crop in enumerate(crops.to_pylist()):
                if not crop["removed"]:
                    path = str(PurePosixPath(folder, crop["source"] if several else "", crop["name"]))
                    label = None if UNKNOWN in (crop["pid"], crop["camera"]) else (crop["pid"], crop["camera"])
                    rows[path] = _Row(number, row, crop["key"], ImageEntry(path, crop["size"], label))
        return rows

    def images(self, folder: str) -> list[ImageEntry]:
        return sorted(row.entry for path, row in self._rows.items() if f"/{folder}/" in f"/{path}")

    def has(self, folder: str) -> bool:
        return any(f"/{folder}/" in f"/{path}" for path in self._rows)

    def read(self, path: str) -> bytes:
        found = self._rows[path]
        return self._shards[found.manifest][1].reader.read_checked(found.row, path)

    def hashes(self, paths: Sequence[str]) -> NDArray[np.uint64]:
        """As the indexes have them: nothing is read."""
        rows = (self._rows[path] for path in paths)
        digests = (self._shards[found.manifest][1].reader.places.xxh3[found.row] for found in rows)
        return np.fromiter(digests, np.uint64, len(paths))

    def keys(self, paths: Sequence[str]) -> list[str]:
        return [self._rows[path].key for path in paths]


def _opened(manifest: Manifest, storage: StorageConfig) -> Opened:
    """With the whole data set as one window: where it fits into memory or on disk, every block is fetched once."""
    config = StreamConfig()
    return open_manifest(manifest, storage, StreamConfig(window=max(2, -(-manifest.rows // config.block))))


def _sharded(store: Store) -> bool:
    try:
        return bool(manifest_files(store))
    except NotFoundError:
        return False
