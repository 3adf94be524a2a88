"""A layout and a source -> the labelled images of every part, and what of it is not there."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from datapipe.core.errors import DataError
from datapipe.formats.text import decode_text
from datapipe.sources.labels import WIDTHS, fits
from training.reid.datasets.benchmarks import DiskLayout, SplitFacts
from training.reid.datasets.image_stores import ImageEntry, ImageStore
from training.reid.datasets.reid_set import JUNK, Labelled

Row = tuple[str, int, int]
"""Path, identity, camera from 1."""


class Found(NamedTuple):
    """An image of a part, and what its list or its folder says."""

    entry: ImageEntry
    pid: int | None = None
    """Identity beside it in a list; None: the name tells."""
    camera: int | None = None
    """Camera, from 1, that its folder counts as; None: the name tells."""


@dataclass(frozen=True)
class PartRead:
    """One part as it was found."""

    images: Labelled
    missing: tuple[str, ...]
    """What lists name and no folder has."""


def lacks(source: ImageStore, layout: DiskLayout) -> list[str]:
    """What of the test set is not there at all: lists, folders with images. Nothing: the layout fits."""
    parts = (layout.query, layout.gallery)
    lists = [name for part in parts for name in part.lists if not source.store.exists(name)]
    folders = [part.folders[0] for part in parts if not any(source.has(folder) for folder in part.folders)]
    return [*lists, *(f"{folder}/" for folder in dict.fromkeys(folders))]


def read_part(source: ImageStore, part: SplitFacts, layout: DiskLayout) -> PartRead:
    """Read the images of one part in the order of their paths, junk left out; none where folders or lists are not
    there.

    Raises DataError for names without labels, empty files, and several files of one name.
    """
    found, missing = _listed(source, part) if part.lists else (_in_folders(source, part), [])
    _refuse_empty_files(source, [image.entry for image in found])
    for camera in {image.camera for image in found}:  # 001_01.jpg may be an occluded image and a whole one
        _refuse_equal_names(source, [image.entry for image in found if image.camera == camera])
    rows = sorted(row for row in _rows(source, found, layout) if row[1] != JUNK)
    paths, pids, cameras = zip(*rows, strict=True) if rows else ((), (), ())
    images = Labelled(np.array(paths, np.str_), np.array(pids, np.int64), np.array(cameras, np.int64) - 1)
    return PartRead(images, tuple(missing))


def _in_folders(source: ImageStore, part: SplitFacts) -> list[Found]:
    cameras = part.cameras or (None,) * len(part.folders)
    return [Found(entry, camera=camera) for folder, camera in zip(part.folders, cameras, strict=True)
            for entry in source.images(folder)]  # fmt: skip


def _listed(source: ImageStore, part: SplitFacts) -> tuple[list[Found], list[str]]:
    """(the images that the lists name, with the identities beside them; the names that no folder has)."""
    entries_of_folder = {folder: {entry.path: entry for entry in source.images(folder)} for folder in part.folders}
    present: list[Found] = []
    missing = []
    for name, pid in _read_lists(source, part):
        paths = ((folder, f"{folder}/{name}") for folder in part.folders)
        entry = next(
            (entries_of_folder[folder][path] for folder, path in paths if path in entries_of_folder[folder]), None
        )
        if entry is None:
            missing.append(f"{part.folders[0]}/{name}")
        else:
            present.append(Found(entry, pid))
    return present, missing


def _read_lists(source: ImageStore, part: SplitFacts) -> Iterator[tuple[str, int | None]]:
    """(name, identity beside it or None) of every line of the lists that are there."""
    for file in part.lists:
        if not source.store.exists(file):
            continue
        data = source.store.read(file)
        try:
            yield from _matlab_rows(data, part.column) if file.endswith(".mat") else _lines(data)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the list cannot be read: {error!r}",
                where=source.store.address(file),
                hint="take it anew from the data set's archive",
            ) from error


def _lines(data: bytes) -> list[tuple[str, int | None]]:
    """Parse lines such as "0000/0000_000_01_0303morning_0015_0.jpg 0", or names alone: (name, label)."""
    words = [line.split() for line in decode_text(data).splitlines() if line.strip()]
    return [(line[0].replace("\\", "/"), int(line[1]) if len(line) > 1 else None) for line in words]


def _matlab_rows(data: bytes, column: str) -> list[tuple[str, int | None]]:
    """Parse CUHK03's new protocol: names in `filelist`, identities in `labels`, rows of the part (from 1) in
    `column`."""
    from scipy.io import loadmat, matlab  # half a second that other sets do without

    try:
        content = loadmat(io.BytesIO(data), simplify_cells=True)
    except matlab.MatReadError as error:
        raise ValueError(str(error)) from error
    rows = np.ravel(content[column]).astype(np.int64) - 1
    return [(str(content["filelist"][row]), int(content["labels"][row])) for row in rows]


def _rows(source: ImageStore, present: Iterable[Found], layout: DiskLayout) -> Iterator[Row]:
    name, unlabelled, beyond = re.compile(layout.name), [], []
    for entry, listed, camera in present:
        label = entry.label or _label(name, entry.path, camera)
        if label is None:
            unlabelled.append(entry.path)
        elif not fits("camera", label[1]) or not -(1 << 63) <= label[0] < 1 << 63:
            beyond.append(entry.path)
        else:
            yield entry.path, label[0] if listed is None else listed, label[1] if camera is None else camera
    and_camera, hint = " and camera", "<identity>_c<camera>..., for example 0002_c1s1_000451_03.jpg"
    if "camera" not in name.groupindex:
        and_camera, hint = "", "<identity>_..., for example 001_01.jpg"
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} images carry no identity{and_camera} in their name",
            where=source.store.address(unlabelled[0]),
            hint=f"name them {hint}",
        )
    if beyond:
        raise DataError(
            f"{len(beyond)} images have a number in their name that is too large: identities take up to 64 bits, "
            f"cameras up to {WIDTHS['camera']}; is it a date?",
            where=source.store.address(beyond[0]),
            hint=f"name them {hint}",
        )


def _label(name: re.Pattern[str], path: str, camera_of_folder: int | None) -> tuple[int, int] | None:
    match = name.match(PurePosixPath(path).name)
    return (int(match["pid"]), camera_of_folder or int(match["camera"])) if match else None


def _refuse_empty_files(source: ImageStore, entries: list[ImageEntry]) -> None:
    empty = [entry.path for entry in entries if not entry.size]
    if empty:
        raise DataError(
            f"{len(empty)} images are empty files",
            where=source.store.address(empty[0]),
            hint="an archive that was not unpacked to its end, or a full disk? Unpack it again",
        )


def _refuse_equal_names(source: ImageStore, entries: list[ImageEntry]) -> None:
    base, times = Counter(PurePosixPath(entry.path).name for entry in entries).most_common(1)[0] if entries else ("", 0)
    if times > 1:
        paths = [entry.path for entry in entries if PurePosixPath(entry.path).name == base]
        raise DataError(
            f"{times} files are called {base}: {', '.join(paths[:3])}",
            where=source.url,
            hint="an archive unpacked twice? Each image may be there only once",
        )
