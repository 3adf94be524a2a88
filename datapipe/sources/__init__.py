"""Where crops come from, one file each. A source lists its work as units and reads a unit one crop at a time.

To add one: a file with a class that has what `Source` and `Kind` (base.py) ask for, and a line in `_kinds`.
"""

import re
from collections import Counter
from collections.abc import Sequence

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.sources.base import Kind, Source
from datapipe.sources.location import Location, find_place, printable
from datapipe.storage import full_url


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
    from datapipe.sources.lmdb import LmdbSource
    from datapipe.sources.parquet import ParquetSource
    from datapipe.sources.video import VideoSource

    return LmdbSource, VideoSource, ArchiveSource, ParquetSource, FolderSource


def _open(place: Location) -> Source:
    for kind in _kinds():
        if source := kind.at(place):
            return source
    what = "the source holds no images" if place.is_folder else "this file is no source of crops"
    raise DataError(
        what,
        where=place.url,
        hint="understood are:\n         " + "\n         ".join(kind.UNDERSTANDS for kind in _kinds()),
    )
