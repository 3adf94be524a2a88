"""Members of tars, from front to back."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from datapipe.errors import DataError
from datapipe.sources.pieces import MOST_MEMBER_BYTES, plain_name
from datapipe.sources.place import is_image

END_BYTES = 1024
"""A tar ends with two blocks of zeros; one that does not was cut."""
SPECIAL = {
    tarfile.LNKTYPE: "a hard link to",
    tarfile.SYMTYPE: "a symbolic link to",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Member(NamedTuple):
    """A file in a tar, or something that is none."""

    name: str
    data: bytes
    """Of images and JSON; other members are passed over unread."""
    problem: str
    """A link (never followed), a device, too large; otherwise empty."""


def read_members(stream: BinaryIO, url: str, *, packed: bool) -> Iterator[Member]:
    """All members but folders; `packed`: with gzip. Raises DataError where the tar is cut or damaged."""
    if not packed:
        _check_end(stream, url)
    content = cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if packed else stream
    try:
        with tarfile.open(fileobj=content, mode="r|") as tar:
            for info in tar:
                if not info.isdir():
                    yield _member(tar, info)
                tar.members = []  # type: ignore[attr-defined]  # it would grow
            if not packed:
                content.seek(tar.offset)
        _check_rest(content, url)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(str(error), url) from error


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    name = plain_name(info.name)
    if not info.isreg():
        return Member(name, b"", f"{SPECIAL.get(info.type, 'no file')} {info.linkname}".strip())
    if not (is_image(name) or name.lower().endswith(".json")):
        return Member(name, b"", "")
    if info.size > MOST_MEMBER_BYTES:
        return Member(name, b"", f"larger than {MOST_MEMBER_BYTES:,} bytes")
    file = tar.extractfile(info)
    assert file  # a regular file
    return Member(name, file.read(), "")


def _check_end(stream: BinaryIO, url: str) -> None:
    """tarfile takes a tar that was cut between two members for a complete one."""
    total = stream.seek(0, 2)
    stream.seek(max(0, total - END_BYTES))
    if total < END_BYTES or stream.read().strip(b"\0"):
        raise DataError("the tar is cut: its end is missing", where=url, hint="copy it again, or leave it out")
    stream.seek(0)


def _check_rest(content: BinaryIO, url: str) -> None:
    """tarfile stops in silence at a damaged header, and where one tar was appended to another."""
    for block in iter(lambda: content.read(1 << 20), b""):
        if block.strip(b"\0"):
            raise _damaged("there are more bytes after what looks like its end", url)


def _damaged(what: str, url: str) -> DataError:
    return DataError(
        f"the tar cannot be read to its end: {what}",
        where=url,
        hint="it was cut or damaged: copy it again, or leave it out; if it is several tars that "
        "were joined, unpack it with tar --ignore-zeros",
    )
