"""Where crops come from, one file each. A source lists its work as units and reads a unit one crop at a time.

To add one: a class with `label`, `units` and `read`, and a line in `_open`. Units and sources are picklable: whoever
reads a unit may be another process on another machine.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from datapipe.config import StorageConfig
from datapipe.errors import DataError, NotFoundError
from datapipe.storage import open_store

UNKNOWN = -1
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""Names with these endings, upper or lower case, are taken for images; what they really are, screening finds out."""
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


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
    """A part of a source that one process reads in one go."""

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


def open_sources(urls: Sequence[str], storage: StorageConfig) -> list[Source]:
    """One source per url: a folder of images, a folder of tars, one tar, or a brace pattern of tars.

    Labels are the last parts of the urls, as many as it takes to tell them apart.
    """
    if not urls:
        raise DataError("no source was given", hint="python -m datapipe shard FOLDER --out FOLDER")
    plain = [url.rstrip("/") or "/" for url in urls]
    repeated = [url for url, count in Counter(plain).items() if count > 1]
    if repeated:
        raise DataError("a source was given twice", where=repeated[0], hint="give each source once")
    return [_open(url, label, storage) for url, label in zip(plain, _labels(plain), strict=True)]


def _labels(urls: Sequence[str]) -> list[str]:
    parts = [url.rpartition("://")[2].strip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [url.replace("://", "/") for url in urls]


def _open(url: str, label: str, storage: StorageConfig) -> Source:
    from datapipe.sources.folder import FolderSource
    from datapipe.sources.webdataset_shards import ShardsSource

    if url.lower().endswith(TAR_ENDINGS):
        return ShardsSource(url, label, storage)
    try:
        for entry in open_store(url, storage).list():
            if is_tar(entry.name):
                return ShardsSource(url, label, storage)
            if is_image(entry.name):
                return FolderSource(url, label, storage)
    except NotFoundError as error:
        raise DataError(f"the source cannot be opened: {error.what}", where=url,
                        hint="give a folder of images, a tar, or a folder of tars; check for a typing mistake"
                        ) from error
    raise DataError("the source holds no images", where=url,
                    hint=f"images end in {', '.join(IMAGE_ENDINGS)}; tars in {', '.join(TAR_ENDINGS)}")


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image. Hidden files and folders are not."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def is_tar(name: str) -> bool:
    """Whether a file of this name is read as a tar. Hidden files and folders are not."""
    return name.lower().endswith(TAR_ENDINGS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether the file or a folder above it starts with a dot: copies of metadata, work in progress."""
    return name.startswith(".") or "/." in name
