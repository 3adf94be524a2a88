"""Folders of images at any depth, on disk or on an object store; Market-1501-style names give person and camera."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from datapipe.core.config import StorageConfig
from datapipe.core.parallel import in_order
from datapipe.dataset.remarks import Remarks
from datapipe.sources.archive_parts import MOST_MEMBER_BYTES
from datapipe.sources.base import UNIT_BYTES, UNIT_CROPS, Crop
from datapipe.sources.labels import labelled
from datapipe.sources.location import IMAGE_ENDINGS, IMAGES, Location, SourceFile, list_files
from datapipe.storage import is_remote, open_store

REMOTE_READS = 16
"""Objects asked for at once from a store, per process; a folder on disk is read one file after the other."""

TOO_LARGE = f"larger than {MOST_MEMBER_BYTES:,} bytes"


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

    UNDERSTANDS = f"a folder of images at any depth ({', '.join(IMAGE_ENDINGS)})"

    url: str
    folder: str
    """Url that the names are below; of a pattern, the folder before its first wildcard."""
    label: str
    storage: StorageConfig

    @classmethod
    def at(cls, place: Location) -> "FolderSource | None":
        holds_images = place.is_folder and IMAGES in place.kinds
        return cls(place.url, place.folder, place.label, place.storage) if holds_images else None

    def units(self, remarks: Remarks | None = None) -> Iterator[FolderUnit]:
        batch: list[SourceFile] = []
        size = 0
        for file in list_files(self.url, self.storage, IMAGES, remarks):
            batch.append(file)
            size += min(file.size, MOST_MEMBER_BYTES)  # of more, no more is read
            if len(batch) == UNIT_CROPS or size >= UNIT_BYTES:
                yield _unit(batch)
                batch, size = [], 0
        if batch:
            yield _unit(batch)

    def read(self, unit: FolderUnit, remarks: Remarks | None = None) -> Iterator[Crop]:
        names = unit.names.split("\0")
        for name, data in zip(names, self._contents(names), strict=True):
            problem = TOO_LARGE * (len(data) > MOST_MEMBER_BYTES)
            yield labelled(self.label, name, b"" if problem else data, problem=problem)

    def _contents(self, names: list[str]) -> Iterator[bytes]:
        store = open_store(self.folder, self.storage)

        def read(name: str) -> bytes:
            return store.read(name, start=0, size=MOST_MEMBER_BYTES + 1)

        return in_order(read, names, threads=REMOTE_READS if is_remote(self.url) else 0)


def _unit(files: list[SourceFile]) -> FolderUnit:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
    return FolderUnit(
        "\0".join(file.name for file in files),
        sum(min(file.size, MOST_MEMBER_BYTES) for file in files),
        digest.hexdigest(),
    )
