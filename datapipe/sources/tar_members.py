"""Members of tars, from front to back, and the WebDataset samples among them.

Which members belong together is for the webdataset library to say. Its own reader is not used: it drops links in
silence, and takes a tar that was cut between two members for a complete one.
"""

import tarfile
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from datapipe.core.bounds.text_trees import parse_json
from datapipe.core.bounds.unpacking import ERRORS, Unpackers, pieces, unpacker_of
from datapipe.core.errors import DataError
from datapipe.dataset.remarks import Remarks
from datapipe.formats.file_kinds import EMPTY, LOOKED_AT, TAR, kind_of_bytes, other_hint
from datapipe.sources.archive_parts import MOST_MEMBER_BYTES, plain_name
from datapipe.sources.base import Crop
from datapipe.sources.labels import labelled
from datapipe.sources.location import IMAGE_ENDINGS, is_image

BLOCK = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK
"""A tar ends with two blocks of zeros; one that does not was cut."""
LOOKED_AT_FIRST, LOOKED_BYTES = 64, 16 << 20
"""Members, and bytes, at the beginning of a tar that tell whether it holds samples."""
MOST_HEADER_BYTES, MOST_HEADERS_BYTES = 1 << 20, 4 << 20
"""Of a long name or of a pax header, and of all that stand before one member, those for all members included."""
MOST_REST_BYTES = 1 << 30
"""Zeros behind a tar's end; tapes fill up their last record, some MB at most."""
MOST_RECORD_BYTES = 16 << 20
"""Of the JSON beside a crop; a larger one is reported."""
MOST_SAMPLE_BYTES = 2 * MOST_MEMBER_BYTES
"""Of the images of one sample: they are held together."""
MOST_PROBLEMS = 100_000
"""Links and the like in a tar of samples: they are held until its end."""
READ_BYTES = 8 << 20
"""Bytes that are read and thrown away rather than jumped over."""
SPECIAL = {
    tarfile.LNKTYPE: "a hard link to",
    tarfile.SYMTYPE: "a symbolic link to",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
ABOUT_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX)
"""Headers that say something of the next member, or (XGLTYPE) of all that follow."""


class Member(NamedTuple):
    """A file in a tar, or something that is none."""

    name: str
    data: bytes
    """Content of an image or a JSON file; other members are passed over unread."""
    problem: str
    """A link (never followed), a device, too large; otherwise empty."""


def read_members(stream: BinaryIO, url: str) -> Iterator[Member]:
    """All members but folders, of a tar or of one in gzip, bzip2 or xz, as its first bytes tell and not its name.
    Raises DataError where it is none of these, cut or damaged.

    tarfile parses the headers, but does not follow them: it would hold names of any length, and go on for ever for the
    sizes that some state.
    """
    content: _Front
    start = _start(stream)
    if unpacker := unpacker_of(start):
        packed = kind_of_bytes(start)
        _refuse_others(_unpacked_start(stream, unpacker), url, within=f"{packed}, but no tar in it")
        content = _Unpacked(stream, unpacker)
    else:
        _refuse_others(start, url, within="no tar")
        _check_end(stream, url)
        content = _Plain(stream)
    try:
        yield from _members(content)
        _check_rest(content)
    except (tarfile.TarError, *ERRORS) as error:
        raise _damaged(str(error), url) from error


class _Front(Protocol):
    """Bytes from front to back."""

    def read(self, size: int) -> bytes:
        """As many as there are, `size` at most."""

    def skip(self, size: int) -> None:
        """Raises EOFError where there are not so many."""


class _Plain:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._total = stream, stream.seek(0, 2)
        stream.seek(0)

    def read(self, size: int) -> bytes:
        return self._stream.read(size)

    def skip(self, size: int) -> None:
        if self._stream.tell() + size > self._total:
            raise EOFError("it ends within a member")
        if size <= READ_BYTES:  # whoever fetches blocks goes on with the next one
            self._stream.read(size)
        else:
            self._stream.seek(size, 1)


class _Unpacked:
    def __init__(self, stream: BinaryIO, unpacker: Unpackers) -> None:
        self._pieces, self._held = pieces(stream.read, unpacker), memoryview(b"")

    def read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing and (part := self._next(missing)):
            parts.append(part)
            missing -= len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        while size:
            if not (part := self._next(size)):
                raise EOFError("it ends within a member")
            size -= len(part)

    def _next(self, most: int) -> memoryview:
        held = self._held or memoryview(next(self._pieces, b""))
        self._held = held[most:]
        return held[:most]


def _members(content: _Front) -> Iterator[Member]:
    shared: dict[str, str] = {}  # what pax headers say of all members
    own: dict[str, str] = {}  # and of the next one
    before = always = 0  # bytes of such headers
    while (block := content.read(BLOCK)).strip(b"\0"):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.type in ABOUT_NEXT:
            before += info.size + BLOCK
            always += info.size * (info.type == tarfile.XGLTYPE)
            if not 0 <= info.size <= MOST_HEADER_BYTES or max(before, always) > MOST_HEADERS_BYTES:
                raise tarfile.ReadError(f"a name or a header of {info.size:,} bytes, or {before:,} bytes of them")
            said = _said(info.type, _whole(content, info.size))
            content.skip(-info.size % BLOCK)
            (shared if info.type == tarfile.XGLTYPE else own).update(said)
            continue
        member = _member(content, info, shared | own)
        if member:
            yield member
        own, before = {}, 0


def _said(kind: bytes, data: bytes) -> dict[str, str]:
    """What a header says of another member, in pax's words."""
    if kind in PAX:
        return _pax_records(data)
    name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return {"path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath": name}


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines of "LENGTH KEY=VALUE", the length being that of the whole line."""
    records: dict[str, str] = {}
    place = 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 10)
        length = int(data[place:space]) if data[place : max(space, 0)].isdigit() else 0
        end = place + length
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a pax header is damaged")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place = end
    return records


def _member(content: _Front, info: tarfile.TarInfo, said: dict[str, str]) -> Member | None:
    """None for a folder. Leaves what comes next where the next header is."""
    size = _size(said["size"]) if "size" in said else info.size
    if size < 0:
        raise tarfile.ReadError("a member of a negative size")
    name = plain_name(said.get("GNU.sparse.name", said.get("path", info.name)))
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    stored = -(-size // BLOCK) * BLOCK if has_data else 0
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said):
        _skip_map(content, info)
        content.skip(stored)
        return Member(name, b"", "a sparse file")
    if not info.isreg():
        content.skip(stored)
        problem = f"{SPECIAL.get(info.type, 'no file')} {said.get('linkpath', info.linkname)}".strip()
        return None if info.isdir() else Member(name, b"", problem)
    is_record = name.lower().endswith(".json")
    most = MOST_RECORD_BYTES if is_record else MOST_MEMBER_BYTES
    if size > most and (is_record or is_image(name)):
        content.skip(stored)
        return Member(name, b"", f"larger than {most:,} bytes")
    if not (is_image(name) or is_record):
        content.skip(stored)
        return Member(name, b"", "")
    data = _whole(content, size)
    content.skip(stored - size)
    return Member(name, data, "")


def _size(text: str) -> int:
    if not text.isdecimal() or len(text) > 19:
        raise tarfile.ReadError("a pax header states no size")
    return int(text)


def _skip_map(content: _Front, info: tarfile.TarInfo) -> None:
    """The rest of the list of holes of a sparse file, of GNU's old kind, which has a block for every 21 of them."""
    _, more, _ = getattr(info, "_sparse_structs", ((), False, 0))
    while more:
        more = bool(_whole(content, BLOCK)[504])


def _whole(content: _Front, size: int) -> bytes:
    data = content.read(size)
    if len(data) < size:
        raise EOFError("it ends within a member")
    return data


def _start(stream: BinaryIO) -> bytes:
    start = stream.read(LOOKED_AT)
    stream.seek(0)
    return start


def _unpacked_start(stream: BinaryIO, unpacker: Unpackers) -> bytes:
    """First bytes of what is compressed; empty where it is damaged, which is told where it is read."""
    try:
        return _Unpacked(stream, unpacker).read(LOOKED_AT)
    except ERRORS:
        return b""
    finally:
        stream.seek(0)


def _refuse_others(start: bytes, url: str, *, within: str) -> None:
    """DataError for a file that is of another kind than a tar, as browsers and servers leave them under such names."""
    kind = kind_of_bytes(start)
    if kind and kind not in (TAR, *EMPTY):
        raise DataError(f"this is {within}: {kind}", where=url, hint=other_hint(kind))


def _check_end(stream: BinaryIO, url: str) -> None:
    """A tar that was cut between two members looks like a complete one."""
    total = stream.seek(0, 2)
    stream.seek(max(0, total - END_BYTES))
    if total < END_BYTES or stream.read().strip(b"\0"):
        raise DataError("the tar is cut: its end is missing", where=url, hint="copy it again, or leave it out")
    stream.seek(0)


def _check_rest(content: _Front) -> None:
    """What follows the end: zeros, and not without end; one tar appended to another goes on there."""
    rest = 0
    while block := content.read(1 << 20):
        rest += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("there are more bytes after what looks like its end")
        if rest > MOST_REST_BYTES:
            raise tarfile.ReadError(f"more than {MOST_REST_BYTES:,} zeros follow its end")


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
    while len(first) < LOOKED_AT_FIRST and sum(len(member.data) for member in first) < LOOKED_BYTES:
        if (member := next(members, None)) is None:
            break
        first.append(member)
    has_samples = any(
        _key(one.name) == _key(next_one.name) and is_image(one.name) != is_image(next_one.name)
        for one, next_one in pairwise(first)
    )
    return TarContents(has_samples, chain(first, members))


def read_samples(
    members: Iterator[Member], label: str, prefix: str, url: str, remarks: Remarks | None = None
) -> Iterator[Crop]:
    """The images of all samples, with the labels of the .json beside them; links and the like come last.

    Raises DataError where two members have the same name, or labels are not JSON.
    """
    # Imported here because webdataset loads torch where it finds it: seconds that other sources do without.
    from webdataset.tariterators import group_by_keys

    problems: list[Member] = []

    def files() -> Iterator[dict[str, Any]]:
        key, held = "", 0
        for member in members:
            if member.problem:
                problems.append(member)
                if len(problems) > MOST_PROBLEMS:
                    raise ValueError(f"more than {MOST_PROBLEMS:,} members are links, or no files at all")
                continue
            held = len(member.data) + (held if _key(member.name) == key else 0)
            key = _key(member.name)
            if held > MOST_SAMPLE_BYTES:
                raise ValueError(f"the sample {key!r} has more than {MOST_SAMPLE_BYTES:,} bytes")
            if remarks is not None and not is_image(member.name) and not member.name.lower().endswith(".json"):
                remarks.pass_over(member.name)
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
    records = {ending.lower(): _record(sample, ending) for ending in sample if _is_json(ending)}
    for ending, data in sample.items():
        if not ending.startswith("__") and ("." + ending).lower().endswith(IMAGE_ENDINGS):
            own = f"{ending.lower().rpartition('.')[0]}.json".removeprefix(".")  # "cam1.0007.jpg" has "cam1.0007.json"
            record, unread = records.get(own) or records.get("json") or ({}, ())
            crop = labelled(label, f"{prefix}{sample['__key__']}.{ending}", cast(bytes, data), record)
            yield crop._replace(unread=(*crop.unread, *unread))


def _is_json(ending: str) -> bool:
    return not ending.startswith("__") and f".{ending.lower()}".endswith(".json")


def _record(sample: dict[str, object], ending: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(what a JSON file of a sample says, what is not understood of it)."""
    try:
        record = parse_json(cast(bytes, sample[ending]))
    except ValueError as error:
        raise ValueError(f"{sample['__key__']}.{ending} is not JSON: {error}") from error
    no_object = (f"JSON that is no object but a {type(record).__name__}",)
    return (record, ()) if isinstance(record, dict) else ({}, no_object)
