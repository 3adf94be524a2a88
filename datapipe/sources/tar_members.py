"""Members of tars, from front to back, and the WebDataset samples among them.

Which members belong together is for the webdataset library to say. Its own reader is not used: it drops links in
silence, and takes a tar that was cut between two members for a complete one.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple, cast

from datapipe.core.errors import DataError
from datapipe.sources.archive_parts import MOST_MEMBER_BYTES, plain_name
from datapipe.sources.base import Crop
from datapipe.sources.labels import labelled
from datapipe.sources.location import IMAGE_ENDINGS, is_image

END_BYTES = 1024
"""A tar ends with two blocks of zeros; one that does not was cut."""
LOOKED_AT, LOOKED_BYTES = 64, 16 << 20
"""Members, and bytes, at the beginning of a tar that tell whether it holds samples."""
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
    """Content of an image or a JSON file; other members are passed over unread."""
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


# -------------------------------------------------------------------------------------------------- WebDataset


class TarContents(NamedTuple):
    """The members of a tar, all of them, and what the first ones tell."""

    has_samples: bool
    """An image has a file of the same name and another ending beside it: its labels."""
    members: Iterator[Member]


def look_ahead(members: Iterator[Member]) -> TarContents:
    """Whether a tar holds WebDataset samples, or just images. Its own members decide, so all machines agree."""
    first: list[Member] = []
    while len(first) < LOOKED_AT and sum(len(member.data) for member in first) < LOOKED_BYTES:
        if (member := next(members, None)) is None:
            break
        first.append(member)
    has_samples = any(
        _key(one.name) == _key(next_one.name) and is_image(one.name) != is_image(next_one.name)
        for one, next_one in pairwise(first)
    )
    return TarContents(has_samples, chain(first, members))


def read_samples(members: Iterator[Member], label: str, prefix: str, url: str) -> Iterator[Crop]:
    """The images of all samples, with the labels of the .json beside them; links and the like come last.

    Raises DataError where two members have the same name, or labels are not JSON.
    """
    # Imported here because webdataset loads torch where it finds it: seconds that other sources do without.
    from webdataset.tariterators import group_by_keys

    problems: list[Member] = []

    def files() -> Iterator[dict[str, Any]]:
        for member in members:
            if member.problem:
                problems.append(member)
            else:
                yield {"fname": member.name, "data": member.data, "__url__": url}

    try:
        for sample in group_by_keys(files(), lcase=False):
            yield from _crops(sample, label, prefix)
    except ValueError as error:
        raise DataError(
            f"the samples cannot be read: {error}", where=url, hint="correct the tar, or leave it out"
        ) from error
    for member in problems:
        yield labelled(label, prefix + member.name, b"", problem=member.problem)


def _key(name: str) -> str:
    """What members of one sample share: all up to the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _crops(sample: dict[str, object], label: str, prefix: str) -> Iterator[Crop]:
    record = _record(sample)
    for ending, data in sample.items():
        if not ending.startswith("__") and ("." + ending).lower().endswith(IMAGE_ENDINGS):
            yield labelled(label, f"{prefix}{sample['__key__']}.{ending}", cast(bytes, data), record)


def _record(sample: dict[str, object]) -> dict[str, Any]:
    text = sample.get("json")
    if not isinstance(text, bytes):
        return {}
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{sample['__key__']}.json is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}
