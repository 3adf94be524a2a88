"""Zips and tars, whole or cut into pieces, alone, in folders or by brace pattern. Members are never written to disk.

What a member is called is only its name: one that points outside ("../x.jpg", "/x.jpg") is read like any other. Links
and devices are not followed; the crops they might have been are reported.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from datapipe.core.bounds.unpacking import FREE_BYTES, MOST_TIMES
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.remarks import Remarks
from datapipe.sources.archive_parts import Archive, list_archives, open_archive
from datapipe.sources.base import UNIT_BYTES, UNIT_CROPS, Crop
from datapipe.sources.labels import labelled
from datapipe.sources.location import ARCHIVES, Location, is_hidden, is_image
from datapipe.sources.tar_members import look_ahead, read_members, read_samples
from datapipe.sources.zip_members import check_readable, find_directory, list_entries, read_entry

LISTED_BYTES = 16 << 20
"""Bytes of a zip's directory at which a unit ends, whatever is listed there: they are held in memory."""


@dataclass(frozen=True)
class ArchiveUnit:
    """A whole tar, or a slice of a zip's directory."""

    archive: Archive
    start: int
    """First byte of the slice of the directory; 0 for a tar."""
    size: int
    """Bytes of that slice; 0 for a tar."""
    shift: int
    """Bytes that were put before a zip, as self-extracting ones have."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class ArchiveSource:
    """One archive, a folder of them, or a brace pattern such as "s3://bucket/set/{000..127}.tar"."""

    UNDERSTANDS = (
        "a zip, a tar (.tar, .tar.gz, .tar.bz2, .tar.xz) of images or of WebDataset samples, a folder or a {00..12} or "
        "*.tar pattern of them, or their pieces (.zip.001, .tar.aa, .z01)"
    )

    url: str
    label: str
    storage: StorageConfig

    @classmethod
    def at(cls, place: Location) -> "ArchiveSource | None":
        return cls(place.url, place.label, place.storage) if ARCHIVES in place.kinds else None

    def units(self, remarks: Remarks | None = None) -> Iterator[ArchiveUnit]:
        for archive in list_archives(self.url, self.storage, remarks):
            if archive.is_zip:
                yield from self._slices(archive, remarks or Remarks())
            else:
                yield ArchiveUnit(archive, 0, 0, 0, archive.size, _digest(archive))

    def read(self, unit: ArchiveUnit, remarks: Remarks | None = None) -> Iterator[Crop]:
        with open_archive(unit.archive, self.storage) as stream:
            if unit.archive.is_zip:
                yield from self._zip(stream, unit)
            else:
                yield from self._tar(stream, unit.archive, remarks or Remarks())

    def _slices(self, archive: Archive, remarks: Remarks) -> Iterator[ArchiveUnit]:
        with open_archive(archive, self.storage) as stream:
            start, size, shift = find_directory(stream, archive.volumes, archive.url)
            begin = position = start
            crops = packed = total = plain = 0
            digest = hashlib.sha256(archive.name.encode("utf-8", "surrogateescape"))
            for entry in list_entries(stream, start, size, archive.volumes, archive.url):
                check_readable(entry, archive.url)
                digest.update(entry.facts)
                position = entry.end
                total, plain = total + entry.packed, plain + entry.size
                if total > archive.size:
                    raise _overlapping(archive)
                if plain > FREE_BYTES + MOST_TIMES * archive.size:
                    raise DataError(
                        f"the zip of {archive.size:,} bytes would unpack to more than {plain:,}: no images do that",
                        where=archive.url,
                        hint="do not trust it; unpack it with another program, and give the folder",
                    )
                if is_wanted(entry.name, entry.special):
                    crops, packed = crops + 1, packed + entry.packed
                elif not is_hidden(entry.name):
                    remarks.pass_over(entry.name)
                if crops == UNIT_CROPS or packed >= UNIT_BYTES or position - begin >= LISTED_BYTES:
                    if crops:
                        yield ArchiveUnit(archive, begin, position - begin, shift, packed, digest.hexdigest())
                    begin, crops, packed = position, 0, 0
            if crops:
                yield ArchiveUnit(archive, begin, position - begin, shift, packed, digest.hexdigest())

    def _zip(self, stream: BinaryIO, unit: ArchiveUnit) -> Iterator[Crop]:
        stream.seek(unit.start)
        listed = io.BytesIO(stream.read(unit.size))
        for entry in list_entries(listed, 0, unit.size, unit.archive.volumes, unit.archive.url):
            if is_wanted(entry.name, entry.special):
                data, problem = read_entry(stream, entry, unit.shift, unit.archive.url)
                yield labelled(self.label, unit.archive.prefix + entry.name, data, problem=problem)

    def _tar(self, stream: BinaryIO, archive: Archive, remarks: Remarks) -> Iterator[Crop]:
        members = read_members(stream, archive.url)
        wanted = (member for member in members if not is_hidden(member.name))
        if (ahead := look_ahead(wanted)).has_samples:
            yield from read_samples(ahead.members, self.label, archive.prefix, archive.url, remarks)
            return
        for member in ahead.members:
            if is_wanted(member.name, member.problem):
                yield labelled(self.label, archive.prefix + member.name, member.data, problem=member.problem)
            else:
                remarks.pass_over(member.name)


def _overlapping(archive: Archive) -> DataError:
    """Bombs are made so: many members that are the same bytes of the archive."""
    return DataError(
        f"the members of the zip are said to take more than its {archive.size:,} bytes: they overlap, or it is damaged",
        where=archive.url,
        hint="do not trust it; unpack it with another program, and give the folder",
    )


def is_wanted(name: str, special: str) -> bool:
    """Images, and whatever a link or a device hides."""
    return is_image(name) or (bool(special) and not is_hidden(name))


def _digest(archive: Archive) -> str:
    facts = "\0".join((archive.name, *map(str, archive.sizes)))
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
