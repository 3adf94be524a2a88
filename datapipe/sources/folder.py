"""Folders of images at any depth, on disk or on an object store; Market-1501-style names give person and camera."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from datapipe.config import StorageConfig
from datapipe.errors import DataError
from datapipe.sources import UNKNOWN, Crop, is_image, is_tar
from datapipe.storage import Entry, is_remote, open_store

UNIT_FILES = 512
REMOTE_READS = 16
"""Objects asked for at once from a store, per process; a folder on disk is read one file after the other."""
MARKET_NAME = re.compile(r"([-\d]+)_c(\d+)")


def parse_market_name(name: str) -> tuple[int, int] | None:
    """(person, camera) of "0002_c1s1_000451_03.jpg" and its kin, as written: camera from 1, junk persons -1.

    Not anchored at the end, as Market-1501 has names like "1488_c3s3_015653_00.jpg.jpg" (stores_and_datasets 3).
    """
    match = MARKET_NAME.match(name.rpartition("/")[2])
    if not match:
        return None
    try:
        return int(match[1]), int(match[2])
    except ValueError:  # "1-2_c3": digits and dashes that are no number
        return None


@dataclass(frozen=True)
class FolderUnit:
    """Neighbouring files of the sorted listing. The names are one string: millions of files cost no objects."""

    names: str
    """Separated by NUL, which no file name holds."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class FolderSource:
    """Every image below a folder; other files are passed over, hidden ones too."""

    url: str
    label: str
    storage: StorageConfig

    def units(self) -> Iterator[FolderUnit]:
        images = self._images()
        while entries := list(islice(images, UNIT_FILES)):
            yield _unit(entries)

    def read(self, unit: FolderUnit) -> Iterator[Crop]:
        names = unit.names.split("\0")
        for name, data in zip(names, self._contents(names), strict=True):
            pid, camera = parse_market_name(name) or (UNKNOWN, UNKNOWN)
            yield Crop(self.label, name, data, pid, camera)

    def _images(self) -> Iterator[Entry]:
        for entry in open_store(self.url, self.storage).list():
            if is_tar(entry.name):
                raise DataError("the folder holds both images and tars", where=f"{self.url}/{entry.name}",
                                hint="give the folders of images and the tars as separate sources")
            if is_image(entry.name):
                yield entry

    def _contents(self, names: list[str]) -> Iterator[bytes]:
        store = open_store(self.url, self.storage)
        if not is_remote(self.url):
            yield from map(store.read, names)
            return
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            for start in range(0, len(names), 4 * REMOTE_READS):  # no more than this many images wait in memory
                yield from pool.map(store.read, names[start:start + 4 * REMOTE_READS])


def _unit(entries: list[Entry]) -> FolderUnit:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name}\0{entry.size}\0".encode("utf-8", "surrogateescape"))
    return FolderUnit("\0".join(entry.name for entry in entries), sum(entry.size for entry in entries),
                      digest.hexdigest())
