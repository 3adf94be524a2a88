"""The directory of a zip read as a stream, and its members by their places.

Python's zipfile holds an object of half a kilobyte for every member; a directory of millions takes gigabytes that way.
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from datapipe.core.bounds.unpacking import ERRORS, bzip2_parts, deflate_member, lzma_member, unpack_member
from datapipe.core.errors import DataError
from datapipe.formats.file_kinds import EMPTY, GZIP, LOOKED_AT, TAR, ZIP, kind_of_bytes, other_hint
from datapipe.sources.archive_parts import MOST_MEMBER_BYTES, plain_name, volumes_missing

END, END_SIGNATURE = struct.Struct("<4s4H2LH"), b"PK\5\6"
END64, END64_SIGNATURE = struct.Struct("<4sQ2H2L4Q"), b"PK\6\6"
LOCATOR, LOCATOR_SIGNATURE = struct.Struct("<4sLQL"), b"PK\6\7"
ENTRY, ENTRY_SIGNATURE = struct.Struct("<4sBB5H3L5H2L"), b"PK\1\2"
LOCAL_BYTES, LOCAL_SIGNATURE = 30, b"PK\3\4"
MOST_COMMENT = 1 << 16
LZMA_HEAD_BYTES = 4
"""Version, and length of the properties, before those (APPNOTE 5.8.8)."""
ESCAPE = 0xFFFFFFFF
"""Stands for a number that is in the Zip64 field instead."""
ENCRYPTED, UTF8 = 0x1, 0x800
UNIX, DARWIN = 3, 19
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Directory(NamedTuple):
    """Where a zip lists its members."""

    start: int
    size: int
    shift: int
    """To add to the places it names: something may have been put before the zip."""


class ZipEntry(NamedTuple):
    """A member, as the directory describes it."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    place: int
    """Offset of the member's local header, in the volumes put together."""
    special: str
    """"a symbolic link", "a device" ...; empty for a file."""
    encrypted: bool
    end: int
    """Offset of the end of the member's entry in the directory."""
    facts: bytes
    """The entry itself, for the digest."""


def find_directory(stream: BinaryIO, volumes: Sequence[int], url: str) -> Directory:
    """`volumes`: where each begins in the stream. Raises DataError where the end of the zip or a volume is missing."""
    total = stream.seek(0, 2)
    tail_start = max(0, total - END.size - MOST_COMMENT)
    stream.seek(tail_start)
    tail = stream.read()
    end_record = tail.rfind(END_SIGNATURE)
    if end_record < 0 or len(tail) - end_record < END.size:
        _refuse_others(stream, url)
        raise _cut("its directory, which is at the end, is missing", url)
    _, disk, first_disk, _, _, size, offset, _ = END.unpack_from(tail, end_record)
    end = tail_start + end_record
    if ESCAPE in (size, offset) or 0xFFFF in (disk, first_disk) or _has_locator(stream, end):
        disk, first_disk, size, offset, end = _read_end64(stream, end, url)
    if disk + 1 != len(volumes) or first_disk > disk:
        raise volumes_missing(url)
    start, named = end - size, volumes[first_disk] + offset
    if start < 0 or start < named:
        raise _cut("its beginning, or a piece in the middle, is missing", url)
    if named < 0 or size > total:
        raise _cut("its directory is damaged", url)
    return Directory(start, size, start - named)


def list_entries(stream: BinaryIO, start: int, size: int, volumes: Sequence[int], url: str) -> Iterator[ZipEntry]:
    """The members in a part of the directory, folders left out. Reads the stream from `start` on, in order."""
    position = start
    while position < start + size:
        stream.seek(position)
        fixed = stream.read(ENTRY.size)
        if len(fixed) < ENTRY.size or not fixed.startswith(ENTRY_SIGNATURE):
            raise _cut("its directory is damaged", url)
        (
            _,
            _,
            system,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            unpacked,
            name_size,
            extra_size,
            comment_size,
            disk,
            _,
            attributes,
            place,
        ) = ENTRY.unpack(fixed)
        rest = stream.read(name_size + extra_size)
        position += ENTRY.size + name_size + extra_size + comment_size
        unpacked, packed, place = _widened((unpacked, packed, place), rest[name_size:])
        if disk >= len(volumes):
            raise volumes_missing(url)
        name = _text(rest[:name_size], flags)
        if system not in (UNIX, DARWIN):
            name = name.replace("\\", "/")  # as PowerShell writes them, against the book
        if not name.endswith("/"):
            special = _special(attributes >> 16) if system in (UNIX, DARWIN) else ""
            yield ZipEntry(
                plain_name(name),
                method,
                crc,
                packed,
                unpacked,
                volumes[disk] + place,
                special,
                bool(flags & ENCRYPTED),
                position,
                fixed + rest,
            )


def check_readable(entry: ZipEntry, url: str) -> None:
    """Raises DataError for what no member of the archive should be: encrypted, or packed in an unknown way."""
    if entry.encrypted:
        raise DataError(
            "the zip is encrypted",
            where=f"{url}: {entry.name}",
            hint="unpack it with its password, and give the folder",
        )
    if entry.method not in METHODS:
        raise DataError(
            f"the zip is packed by method {entry.method}, which cannot be read",
            where=f"{url}: {entry.name}",
            hint="unpack it, and give the folder",
        )


def read_entry(stream: BinaryIO, entry: ZipEntry, shift: int, url: str) -> tuple[bytes, str]:
    """(data, "") of a member, or (nothing, why there is none). Raises DataError where it is not in its place."""
    if entry.special:
        return b"", entry.special
    if entry.size > MOST_MEMBER_BYTES:
        return b"", f"larger than {MOST_MEMBER_BYTES:,} bytes"
    stream.seek(entry.place + shift)
    header = stream.read(LOCAL_BYTES)
    if len(header) < LOCAL_BYTES or not header.startswith(LOCAL_SIGNATURE):
        raise _cut(f"{entry.name!r} is not where its directory says", url)
    stream.seek(sum(struct.unpack_from("<2H", header, 26)), 1)
    try:
        data = _content(stream, entry)
    except ERRORS as error:
        return b"", f"damaged in the archive: {error}"
    return (data, "") if zlib.crc32(data) == entry.crc else (b"", "damaged in the archive: its checksum is wrong")


def _content(stream: BinaryIO, entry: ZipEntry) -> bytes:
    """The bytes of a member that begins here, as many as the directory says and no more; raises ERRORS."""
    packed = entry.packed
    if entry.method == zipfile.ZIP_STORED:
        data = stream.read(min(packed, entry.size))
        if not len(data) == packed == entry.size:
            raise EOFError("bytes are missing")
        return data
    if entry.method == zipfile.ZIP_DEFLATED:
        return unpack_member(stream, deflate_member(), packed, entry.size)
    if entry.method == zipfile.ZIP_BZIP2:
        return unpack_member(stream, bzip2_parts(), packed, entry.size)
    _, length = struct.unpack("<HH", stream.read(LZMA_HEAD_BYTES))
    return unpack_member(stream, lzma_member(stream.read(length), entry.size), packed - LZMA_HEAD_BYTES - length,
                         entry.size)  # fmt: skip


def _refuse_others(stream: BinaryIO, url: str) -> None:
    """DataError for a file that does not even begin like a zip."""
    stream.seek(0)
    kind = kind_of_bytes(stream.read(LOOKED_AT))
    if kind and kind not in (ZIP, *EMPTY):
        hint = "give it the ending .tar.gz or .tar" if kind in (TAR, GZIP) else other_hint(kind)
        raise DataError(f"this is no zip: {kind}", where=url, hint=hint)


def _has_locator(stream: BinaryIO, end: int) -> bool:
    stream.seek(max(0, end - LOCATOR.size))
    return stream.read(4) == LOCATOR_SIGNATURE


def _read_end64(stream: BinaryIO, end: int, url: str) -> tuple[int, int, int, int, int]:
    """Read the Zip64 end record of a large zip: number of this volume and of the directory's first one, bytes of the
    directory, its place there, and its end in the stream."""
    stream.seek(max(0, end - LOCATOR.size - END64.size))
    data = stream.read(END64.size + LOCATOR.size)
    if len(data) < END64.size + LOCATOR.size or data[END64.size :][:4] != LOCATOR_SIGNATURE:
        raise _cut("the end of its directory is missing", url)
    signature, _, _, _, disk, first_disk, _, _, size, offset = END64.unpack_from(data)
    if signature != END64_SIGNATURE:
        raise _cut("the end of its directory is damaged", url)
    return disk, first_disk, size, offset, end - LOCATOR.size - END64.size


def _widened(numbers: tuple[int, ...], extra: bytes) -> Iterator[int]:
    """Take the numbers that did not fit 32 bits from the Zip64 field, and leave the others as they are."""
    wide = b""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + size]
        extra = extra[4 + size :]
    for number in numbers:
        if number == ESCAPE and len(wide) >= 8:
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        yield number


def _text(name: bytes, flags: int) -> str:
    """Unmarked names are in the code page of the IBM PC by the book, in UTF-8 as many programs write them."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("utf-8", "surrogateescape") if flags & UTF8 else name.decode("cp437")


def _special(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "")


def _cut(what: str, url: str) -> DataError:
    return DataError(
        f"the zip is cut or damaged: {what}", where=url, hint="copy it again, with all its pieces, or leave it out"
    )
