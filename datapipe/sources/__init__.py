"""Where crops come from, one file each. A source lists its work as units and reads a unit one crop at a time.

To add one: a file with a class that has what `Source` and `Kind` ask for, and a line in `_kinds`. Sources and units are
picklable: whoever reads a unit may be another process on another machine, and the listing keeps units in a file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from datapipe.config import ShardConfig, StorageConfig
from datapipe.errors import DataError
from datapipe.sources.place import Place, find_place, printable
from datapipe.storage import full_url

UNKNOWN = -1
UNIT_CROPS = 2_048
"""Most crops of a unit, where a source can be cut anywhere."""
UNIT_BYTES = 32_000_000
"""Bytes at which a unit ends, where a source can be cut anywhere."""


class Crop(NamedTuple):
    """One image as it was found."""

    source: str
    """Label of the source: equal on every machine, so no path."""
    name: str
    """Name within the source, unique there; published lists refer to it."""
    data: bytes
    pid: int = UNKNOWN
    """Person, as the source numbers them (Market-1501's junk has -1 as well)."""
    camera: int = UNKNOWN
    """Camera, as the source numbers them, usually from 1."""
    video: str = ""
    """Name of the video within the source; empty where there is none."""
    track: int = UNKNOWN
    """Track of the person, unique within (source, video)."""
    frame: int = UNKNOWN
    """Frame of the video, as the source numbers them."""
    problem: str = ""
    """Why there is no image under this name: a link, a device. `data` is then empty; the scan quarantines the name."""


class Unit(Protocol):
    """A part of a source that one process reads in one go: a frozen dataclass of text and numbers."""

    @property
    def bytes(self) -> int:
        """Bytes to read, for the progress."""

    @property
    def digest(self) -> str:
        """Changes when names or sizes in this part of the source change; the same on every machine."""


class Source(Protocol):
    """See the module."""

    @property
    def label(self) -> str:
        """Its name in keys and indexes."""

    def units(self) -> Iterator[Any]:
        """All work, always in the same order and cut in the same way. Raises DataError where there is none."""

    def read(self, unit: Any) -> Iterator[Crop]:
        """The crops of a unit, always in the same order. Raises DataError where the source is damaged."""


class Kind(Protocol):
    """A class of sources."""

    UNDERSTANDS: str
    """What its urls may point at, for messages."""

    @classmethod
    def at(cls, place: Place) -> Source | None:
        """The source there, if it is of this kind."""


def open_sources(
    urls: Sequence[str], storage: StorageConfig, *, jpeg_quality: int = ShardConfig().jpeg_quality
) -> list[Source]:
    """One source per url, of whatever kind is there; `jpeg_quality` is for crops that are cut from videos.

    Labels are the last parts of the urls, as many as it takes to tell them apart.
    """
    if not urls:
        raise DataError("no source was given", hint="python -m datapipe shard FOLDER --out FOLDER")
    plain = [full_url(url) for url in urls]
    repeated = [url for url, count in Counter(plain).items() if count > 1]
    if repeated:
        raise DataError("a source was given twice", where=repeated[0], hint="give each source once")
    return [
        _open(find_place(url, label, storage, jpeg_quality)) for url, label in zip(plain, _labels(plain), strict=True)
    ]


def _labels(urls: Sequence[str]) -> list[str]:
    named = [re.sub(r"(/\*+)+$", "", url) for url in urls]  # "lup/**" is lup
    parts = [url.rpartition("://")[2].strip("/").split("/") for url in named]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return list(map(printable, labels))
    return [printable(url.replace("://", "/")) for url in urls]


def _kinds() -> tuple[Kind, ...]:
    """In the order in which they are tried: a folder of videos also holds tables of boxes, one of frames images."""
    from datapipe.sources.archive import ArchiveSource
    from datapipe.sources.folder import FolderSource
    from datapipe.sources.lmdb_set import LmdbSource
    from datapipe.sources.parquet_table import ParquetSource
    from datapipe.sources.video import VideoSource

    return LmdbSource, VideoSource, ArchiveSource, ParquetSource, FolderSource


def _open(place: Place) -> Source:
    for kind in _kinds():
        if source := kind.at(place):
            return source
    what = "the source holds no images" if place.is_folder else "this file is no source of crops"
    raise DataError(
        what,
        where=place.url,
        hint="understood are:\n         " + "\n         ".join(kind.UNDERSTANDS for kind in _kinds()),
    )
