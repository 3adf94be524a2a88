"""Labelled query, gallery and training images: which files, which person, which camera.

A named data set is a few facts (`MarketLayout`); reading and checking are written once. Rules of Market-1501: files of
identity -1 are junk and dropped, identity 0000 stays in the gallery as a distractor, files that are no images (the
Thumbs.db of the original archive) are ignored, `.jpg.jpg` is fine. Listings are sorted, so that every machine sees the
same order.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from datapipe.config import StorageConfig
from datapipe.errors import DataError, NotFoundError
from datapipe.sources.labels import parse_market_name
from datapipe.storage import Store, open_store

JUNK = -1
"""Identity of boxes that show no whole person: never in a ranking."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class Labelled:
    """Images of one part, sorted by path. Cameras are 0-based; identities are the files' own numbers."""

    paths: NDArray[np.str_]
    """[N]: relative to the root of the set, '/'-separated."""
    pids: NDArray[np.int64]
    cameras: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class ReIDSet:
    """A test set for retrieval, and the training identities where there are any."""

    name: str
    store: Store
    query: Labelled
    gallery: Labelled
    train: Labelled | None = None

    def read(self, path: str) -> bytes:
        """The bytes of one image, by its path in `Labelled`."""
        return self.store.read(str(path))


@dataclass(frozen=True)
class MarketLayout:
    """The facts of one data set in the layout of Market-1501."""

    name: str
    query: str = "query"
    gallery: str = "bounding_box_test"
    train: str = "bounding_box_train"
    counts: dict[str, int] = field(default_factory=dict)
    """Official number of images of "query", "gallery" and "train" after junk is dropped; empty: not checked."""


def market_folder(root: str | Path, name: str = "", storage: StorageConfig | None = None) -> ReIDSet:
    """Any folder or prefix in the layout of Market-1501; its last part is the name, unless another one is given.

    Errors: `DataError` when query or gallery is missing or empty, when images carry no labels or the same name, when
    no query has a match from another camera.
    """
    layout = MarketLayout(name or PurePosixPath(str(root).rstrip("/")).name)
    return read_market(open_store(str(root), storage or StorageConfig()), layout)


def read_market(store: Store, layout: MarketLayout) -> ReIDSet:
    """Read and check the set that `layout` describes; errors as `market_folder`."""
    query, gallery = (_required(store, folder, layout) for folder in (layout.query, layout.gallery))
    _check_matches(store, query, gallery)
    train = _labelled(store, layout.train)
    found = ReIDSet(layout.name, store, query, gallery, train if len(train) else None)
    _check_counts(found, layout)
    return found


def _required(store: Store, folder: str, layout: MarketLayout) -> Labelled:
    part = _labelled(store, folder)
    if not len(part):
        raise DataError(
            f"no images of people in {folder}/, or no such folder",
            where=store.url,
            hint=f"expected {layout.query}/ and {layout.gallery}/ with names like 0002_c1s1_000451_03.jpg",
        )
    return part


def _labelled(store: Store, folder: str) -> Labelled:
    """Every image below `folder`; empty when the folder is not there."""
    names = _images(store.at(folder))
    labels = [parse_market_name(name) for name in names]
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(names)} images carry no identity and camera in their name",
            where=f"{store.at(folder).url}/{unlabelled[0]}",
            hint="name them <identity>_c<camera>..., for example 0002_c1s1_000451_03.jpg",
        )
    _check_names(store.at(folder), names)
    pairs = zip(names, labels, strict=True)
    rows = [(f"{folder}/{name}", *label) for name, label in pairs if label is not None and label[0] != JUNK]
    paths, pids, cameras = zip(*rows, strict=True) if rows else ((), (), ())
    return Labelled(np.array(paths, np.str_), np.array(pids, np.int64), np.array(cameras, np.int64) - 1)


def _images(store: Store) -> list[str]:
    try:
        return sorted(entry.name for entry in store.list() if entry.name.lower().endswith(IMAGE_SUFFIXES))
    except NotFoundError:
        return []


def _check_names(store: Store, names: list[str]) -> None:
    base, times = Counter(PurePosixPath(name).name for name in names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        twice = [name for name in names if PurePosixPath(name).name == base]
        raise DataError(
            f"{times} files are called {base}: {', '.join(twice[:3])}",
            where=store.url,
            hint="an archive unpacked twice? Each image may be there only once",
        )


def _check_matches(store: Store, query: Labelled, gallery: Labelled) -> None:
    cameras = np.union1d(query.cameras, gallery.cameras)
    if len(cameras) == 1:
        raise DataError(
            f"all images are from camera {cameras[0] + 1}: retrieval compares a person across cameras",
            where=store.url,
            hint="the camera is the number after _c in the file name",
        )
    seen_by: dict[int, set[int]] = {}
    for pid, camera in zip(gallery.pids.tolist(), gallery.cameras.tolist(), strict=True):
        seen_by.setdefault(pid, set()).add(camera)
    pairs = zip(query.pids.tolist(), query.cameras.tolist(), strict=True)
    if not any(seen_by.get(pid, set()) - {camera} for pid, camera in pairs):
        raise DataError(
            f"none of the {len(query)} queries has an image of its identity from another camera in the gallery",
            where=store.url,
            hint="query and gallery must show the same people; are the folders from the same data set?",
        )


def _check_counts(found: ReIDSet, layout: MarketLayout) -> None:
    parts = {"query": found.query, "gallery": found.gallery, "train": found.train or ()}
    wrong = [
        f"{part} has {len(parts[part])} images, not {official}"
        for part, official in layout.counts.items()
        if len(parts[part]) != official
    ]
    if wrong:
        raise DataError(f"this is not all of {layout.name}: {'; '.join(wrong)}", where=found.store.url)
