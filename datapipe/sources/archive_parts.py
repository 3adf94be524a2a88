"""Archives as the file system holds them: whole, or in pieces (cut by bytes, or volumes of a zip) read as one."""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, cast

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.remarks import Remarks
from datapipe.sources.location import ARCHIVE, ARCHIVES, SourceFile, file_urls, list_files
from datapipe.storage import open_object, open_store
from datapipe.storage.file_objects import SeekableReader

READ_BYTES = 1 << 20
MOST_MEMBER_BYTES = 1 << 27
"""Larger members are reported, not read: an uncompressed image of the most pixels that are taken has 120 MB."""


@dataclass(frozen=True)
class Archive:
    """One archive."""

    folder: str
    """Url of the folder that holds it."""
    name: str
    """Below that folder, less the endings of its pieces."""
    pieces: tuple[str, ...]
    sizes: tuple[int, ...]
    prefix: str
    """Put before the names of the members: archives of one source may use the same names."""
    spanned: bool
    """The pieces are volumes of a zip, which names places by volume."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.sizes)

    @property
    def volumes(self) -> tuple[int, ...]:
        """Where each volume begins in the pieces put together; a zip that is not spanned has one."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0)) if self.spanned else (0,)

    @property
    def is_zip(self) -> bool:
        """A zip; otherwise a tar."""
        return self.name.lower().endswith(".zip")

    @property
    def url(self) -> str:
        """For messages."""
        return f"{self.folder.rstrip('/')}/{self.name}"


def list_archives(url: str, storage: StorageConfig, remarks: Remarks | None = None) -> Iterator[Archive]:
    """The archives at a url, in the order of its listing. Raises DataError where a piece is missing."""
    named = bool(file_urls(url, storage))  # other files may join those of a folder or a pattern
    parts_of_archive: dict[tuple[str, str], list[tuple[str, SourceFile]]] = {}
    spanned: dict[tuple[str, str], list[tuple[str, SourceFile]]] = {}
    for file in list_files(url, storage, ARCHIVES, remarks):
        match = ARCHIVE.fullmatch(file.name)
        assert match  # else it were no archive
        if match["spanned"]:
            last = f"{match['spanned']}.{'ZIP' if '.Z' in file.name else 'zip'}"
            parts_of_archive.setdefault((file.folder, last), [])
            spanned.setdefault((file.folder, last), []).append((match["volume"], file))
        else:
            parts_of_archive.setdefault((file.folder, match["archive"]), []).append((match["part"] or "", file))
    for (folder, name), pieces in parts_of_archive.items():
        volumes = spanned.get((folder, name), [])
        whole = [file for part, file in pieces if not part]
        if volumes and not whole:
            raise volumes_missing(f"{folder.rstrip('/')}/{name}")
        files = [*_in_order(volumes), *whole] if volumes else whole or _in_order(pieces)
        alone = len(parts_of_archive) == 1 and named
        yield Archive(
            folder,
            name,
            tuple(file.name for file in files),
            tuple(file.size for file in files),
            "" if alone else f"{name}/",
            bool(volumes),
        )


def open_archive(archive: Archive, storage: StorageConfig) -> "closing[BinaryIO]":
    """The archive as one seekable file."""
    store = open_store(archive.folder, storage)
    if len(archive.pieces) == 1:
        return closing(open_object(store, archive.pieces[0]))
    opened = (open_object(store, piece) for piece in archive.pieces)
    return closing(cast(BinaryIO, io.BufferedReader(Joined(opened, archive.sizes), READ_BYTES)))


def plain_name(name: str) -> str:
    """A member's name in the index: as it is, less the "./" that `tar -C folder .` puts before all of them."""
    while name.startswith("./") and len(name) > 2:
        name = name[2:].lstrip("/")
    return name


def volumes_missing(url: str) -> DataError:
    """What to tell about a spanned zip (x.z01, x.z02 ... x.zip) of which not everything is there."""
    return DataError(
        "a volume of the spanned zip is missing, or there is one too many",
        where=url,
        hint="copy all of .z01, .z02 ... and the .zip itself, which is the last one, into one folder",
    )


class Joined(SeekableReader):
    """Files one after the other, as if they were one. Opens a file when it is first read from."""

    def __init__(self, files: Iterator[BinaryIO], sizes: Sequence[int]) -> None:
        self.files, self.opened = files, list[BinaryIO]()
        self.ends = list(itertools.accumulate(sizes))
        super().__init__(self.ends[-1], READ_BYTES)

    def next_bytes(self, most: int) -> bytes:
        number = next(number for number, end in enumerate(self.ends) if self.position < end)
        file = self._file(number)
        file.seek(self.position - (self.ends[number - 1] if number else 0))
        return file.read(min(most, self.ends[number] - self.position))

    def close(self) -> None:
        for file in self.opened:
            file.close()
        super().close()

    def _file(self, number: int) -> BinaryIO:
        while len(self.opened) <= number:
            self.opened.append(next(self.files))
        return self.opened[number]


def _in_order(pieces: list[tuple[str, SourceFile]]) -> list[SourceFile]:
    """The pieces by their endings, which have to be 000, 001 ... or 001, 002 ... or aa, ab ..."""
    places = sorted((_place(part), file) for part, file in pieces)
    numbered = pieces[0][0].isdigit()
    for expected, (place, file) in enumerate(places, start=min(places[0][0], 1) if numbered else 0):
        if place != expected:
            raise DataError(
                "a piece of the archive is missing, or there twice, before this one",
                where=file.url,
                hint="copy all pieces into the folder; their endings count up from 0, 1 or aa",
            )
    return [file for _, file in places]


def _place(part: str) -> int:
    if part.isdigit():
        return int(part)
    place = 0
    for letter in part.lower():
        place = 26 * place + ord(letter) - ord("a")
    return place
