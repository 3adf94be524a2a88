"""WebDataset tars made by others, read through the webdataset library.

The library takes a tar that was cut between two members for a complete one; here such a tar is an error.
"""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import braceexpand

from datapipe.config import StorageConfig
from datapipe.errors import DataError
from datapipe.sources import IMAGE_ENDINGS, TAR_ENDINGS, UNKNOWN, Crop, is_image, is_tar
from datapipe.sources.folder import parse_market_name
from datapipe.storage import open_store, open_stream, split_url

END_BYTES = 1024
"""A tar ends with two blocks of zeros; one that does not was cut."""
LABELS = {"pid": ("pid", "person", "person_id"), "camera": ("camera", "camid", "camera_id")}
"""Keys of a sample's .json that are taken for person and camera where its name does not tell."""


@dataclass(frozen=True)
class TarUnit:
    """One tar."""

    url: str
    prefix: str
    """Put before the names of the members: tars of one source may use the same names."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class ShardsSource:
    """One tar, a folder of tars, or a brace pattern such as "s3://bucket/set/{000..127}.tar"."""

    url: str
    label: str
    storage: StorageConfig

    def units(self) -> Iterator[TarUnit]:
        for folder, name, size in self._tars():
            prefix = "" if self.url.endswith("/" + name) or self.url == name else f"{name}/"
            digest = hashlib.sha256(f"{name}\0{size}".encode("utf-8", "surrogateescape")).hexdigest()
            yield TarUnit(f"{folder}/{name}", prefix, size, digest)

    def read(self, unit: TarUnit) -> Iterator[Crop]:
        # Imported here because webdataset loads torch where it finds it: seconds that other sources do without.
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        try:
            members = ({**member, "__url__": unit.url} for member in tar_file_iterator(self._open(unit)))
            for sample in group_by_keys(members, lcase=False):
                yield from self._crops(sample, unit.prefix)
        except (tarfile.TarError, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"the tar cannot be read to its end: {error}", where=unit.url,
                            hint="it was cut or damaged: copy it again, or leave it out") from error

    def _tars(self) -> Iterator[tuple[str, str, int]]:
        """(folder, name, bytes) of each tar, sorted within a folder, in the order of a brace pattern."""
        if self.url.lower().endswith(TAR_ENDINGS):
            for url in braceexpand.braceexpand(self.url):
                folder, name = split_url(url)
                yield folder, name, open_store(folder, self.storage).size(name)
            return
        for entry in open_store(self.url, self.storage).list():
            if is_image(entry.name):
                raise DataError("the folder holds both images and tars", where=f"{self.url}/{entry.name}",
                                hint="give the folders of images and the tars as separate sources")
            if is_tar(entry.name):
                yield self.url, entry.name, entry.size

    def _open(self, unit: TarUnit) -> BinaryIO:
        stream = open_stream(unit.url, config=self.storage)
        if not unit.url.lower().endswith(".tar"):
            return cast(BinaryIO, gzip.GzipFile(fileobj=stream))  # its own checks find a cut
        folder, name = split_url(unit.url)
        end = open_store(folder, self.storage).read(name, start=max(0, unit.bytes - END_BYTES), size=END_BYTES)
        if unit.bytes < END_BYTES or end.strip(b"\0"):
            raise DataError("the tar is cut: its end is missing", where=unit.url,
                            hint="copy it again, or leave it out")
        return stream

    def _crops(self, sample: dict[str, object], prefix: str) -> Iterator[Crop]:
        labels = _labels(sample)
        for ending, data in sample.items():
            if not ending.startswith("__") and ("." + ending).lower().endswith(IMAGE_ENDINGS):
                name = f"{sample['__key__']}.{ending}"
                yield Crop(self.label, prefix + name, cast(bytes, data), *(parse_market_name(name) or labels))


def _labels(sample: dict[str, object]) -> tuple[int, int]:
    text = sample.get("json")
    if not isinstance(text, bytes):
        return UNKNOWN, UNKNOWN
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{sample['__key__']}.json is not JSON: {error}") from error
    if not isinstance(record, dict):
        return UNKNOWN, UNKNOWN
    pid, camera = (next((record[key] for key in keys if isinstance(record.get(key), int)), UNKNOWN)
                   for keys in LABELS.values())
    return pid, camera
