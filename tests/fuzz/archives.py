"""Zips and tars as others make them, sound and hostile."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.fuzz.reader import Make, Reader
from tests.fuzz.sources import BLOCK, crops, later, shard


def zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return sink.getvalue()


def make_zip(folder: Path) -> None:
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(folder / "set.zip", "w") as file:
        for number, data in enumerate(crops()):
            file.writestr(f"a/{number:04d}_c1s1_{number:06d}_00.jpg", data, methods[number % 4])
        file.writestr("readme.txt", "crops")


def crafted_zip(entries: Sequence[tuple[str, int, bytes, int, int]]) -> bytes:
    """(name, method, packed, bytes that it is said to have, place of its local header or -1) of each member."""
    body, directory = b"", b""
    for name, method, packed, size, place in entries:
        start = len(body) if place < 0 else place
        facts = struct.pack("<HHHHHLLLHH", 20, 0, method, 0, 33, 0, len(packed), size, len(name), 0)
        if place < 0:
            body += b"PK\3\4" + facts + name.encode() + packed
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<HHHLL", 0, 0, 0, 0, start) + name.encode()
        )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries) % 65_536, len(entries) % 65_536, len(directory),
                      len(body), 0)  # fmt: skip
    return body + directory + end


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def zip_lzma(data: bytes, *, dictionary: int = 1 << 20) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20}]
    packed = lzma.compress(data, lzma.FORMAT_RAW, filters=filters)
    return b"\x09\x04" + struct.pack("<HBL", 5, 93, dictionary) + packed


SMALL = 60_000
ZEROS = 1_500_000_000
PIECE = 25_000_000


@cache
def many_zeros(kind: str) -> bytes:
    """ZEROS zeros, packed: a piece of them again and again."""
    if kind == "bz2":
        return bz2.compress(bytes(PIECE)) * (ZEROS // PIECE)
    if kind == "lzma":
        return zip_lzma(bytes(3 * PIECE))
    if kind == "xz":
        return lzma.compress(bytes(PIECE), preset=0) * (ZEROS // PIECE)
    if kind == "gz":
        return gzip.compress(bytes(PIECE), 1) * (ZEROS // PIECE)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return (packer.compress(bytes(PIECE)) + packer.flush(zlib.Z_FULL_FLUSH)) * (ZEROS // PIECE) + packer.flush()


def overlapping() -> bytes:
    """A thousand members in one place: quines and zip bombs are made so."""
    data = b"\xff\xd8\xff" + bytes(2_000_000)
    first = ("0.jpg", 0, data, len(data), -1)
    return crafted_zip([first, *((f"{number}.jpg", 0, data, len(data), 0) for number in range(1, 300))])


ZIP = Reader(
    "zip", make_zip, ("set.zip",), shard,
    hostile={
        "deflate": later("set.zip", lambda: crafted_zip([("a.jpg", 8, many_zeros("deflate"), 1_000, -1)])),
        "bzip2": later("set.zip", lambda: crafted_zip([("a.jpg", 12, bz2.compress(bytes(PIECE)), 1_000, -1)])),
        "lzma": later("set.zip", lambda: crafted_zip([("a.jpg", 14, many_zeros("lzma"), 1_000, -1)])),
        "lzma with a dictionary of 4 GB": later(
            "set.zip", lambda: crafted_zip([("a.jpg", 14, zip_lzma(bytes(5_000), dictionary=2**32 - 1), 5_000, -1)])),
        "deflate, honest": later("set.zip", lambda: crafted_zip([("a.jpg", 8, many_zeros("deflate"), ZEROS, -1)])),
        "members in one place": later("set.zip", overlapping),
        "many members that are no images": later(
            "set.zip", lambda: crafted_zip([(f"{number:0100d}.txt", 0, b"", 0, -1) for number in range(20_000)])),
        "names": later("set.zip", lambda: zipped(
            [("\x1b[2J.jpg", crops()[0]), ("a\nerror: x.jpg", b"x"), ("../../out.jpg", crops()[1])])),
    },
    refused=frozenset({"members in one place"}),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- tar


def make_tar(folder: Path) -> None:
    """WebDataset samples, long names and links."""
    with tarfile.open(folder / "set.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, data in enumerate(crops()):
            add(tar, f"{number:04d}.jpg", data)
            add(tar, f"{number:04d}.json", b'{"pid": 3, "camera": 1, "video": "v"}')
        add(tar, f"{'long' * 40}.jpg", crops()[0] + b"\0")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../outside.jpg"
        tar.addfile(link)


def make_packed(ending: str, pack: Callable[[bytes], bytes]) -> Make:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, data in enumerate(crops()):
            add(tar, f"{'long' * 30}/{number:04d}_c1s1_{number:06d}_00.jpg", data)
    return later(f"set.tar.{ending}", lambda: pack(sink.getvalue()))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """One header; sizes beyond 8 GB as GNU's tar writes them."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def gz_members(*parts: bytes) -> bytes:
    """Packed one by one: gzip takes them for one file."""
    return b"".join(gzip.compress(part, 1) for part in parts)


def long_header(kind: bytes) -> bytes:
    size = ZEROS // BLOCK * BLOCK
    return gz_members(tar_header("././@LongLink", size, kind)) + many_zeros("gz")


def many_headers(kind: bytes, count: int) -> bytes:
    one = tar_header("././@LongLink", 3, kind) + b"abc".ljust(BLOCK, b"\0")
    return one * count + tar_header("a.jpg", 0) + bytes(1_024)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        size = len(line) + len(str(len(line) + 3))
        body += f"{size}".encode() + line
    return tar_header("pax", len(body), kind) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")


def sample_of_many() -> bytes:
    """One sample of many images: they share all up to the first dot."""
    data = b"\xff\xd8\xff".ljust(2_000_000, b"\0")
    one = [tar_header(f"a.{number}.jpg", len(data)) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")
           for number in range(800)]  # fmt: skip
    start = tar_header("a.json", 2) + b"{}".ljust(BLOCK, b"\0")
    return gz_members(start, *(b"".join(one[first : first + 50]) for first in range(0, 800, 50)), bytes(1_024))


def with_large_dictionary(data: bytes) -> bytes:
    """In xz, with a dictionary of 1.5 GB asked for: the byte of its size in the header of the block, and its sum."""
    packed = bytearray(lzma.compress(data))
    block, end = 12, 12 + 4 * packed[12]
    packed[packed.index(b"\x21\x01", block) + 2] = 0x25
    packed[end : end + 4] = zlib.crc32(packed[block:end]).to_bytes(4, "little")
    return bytes(packed)


TAR = Reader(
    "tar", make_tar, ("set.tar",), shard,
    hostile={
        "no end of headers": later("set.tar", lambda: many_headers(b"L", 3_000)),
        "no end of pax headers": later("set.tar", lambda: pax({"path": "a"}) * 3_000 + bytes(1_024)),
        "member of 2^62 bytes": later("set.tar", lambda: tar_header("a.jpg", 1 << 62) + bytes(2_048)),
        "member of 2^62 bytes by pax": later(
            "set.tar", lambda: pax({"size": str(1 << 62)}) + tar_header("a.jpg", 9) + bytes(2_048)),
        "pax size of many digits": later(
            "set.tar", lambda: pax({"size": "9" * 5_000}) + tar_header("a.jpg", 9) + bytes(2_048)),
        "negative size": later("set.tar", lambda: pax({"size": "-512"}) + tar_header("a.jpg", 9) + bytes(2_048)),
        "sparse": later("set.tar", lambda: pax(
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg",
             "GNU.sparse.realsize": str(1 << 60)}) + tar_header("a.jpg", 512) + b"1\n0\n1\n".ljust(BLOCK, b"\0")
            + bytes(1_024)),
        "names": later("set.tar", lambda: pax({"path": "\x1b[2J\nerror: x.jpg"}) + tar_header("a.jpg", 0)
                       + bytes(1_024)),
    },
)  # fmt: skip
TAR_GZ = Reader(
    "tar_gz", make_packed("gz", gzip.compress), ("set.tar.gz",), shard,
    hostile={
        "long name": later("set.tar.gz", lambda: long_header(b"L")),
        "long link": later("set.tar.gz", lambda: long_header(b"K")),
        "long pax header": later("set.tar.gz", lambda: long_header(b"x")),
        "long global header": later("set.tar.gz", lambda: long_header(b"g")),
        "zeros after the end": later("set.tar.gz", lambda: gz_members(
            tar_header("a.jpg", len(crops()[0])) + crops()[0].ljust(BLOCK * 40, b"\0")) + many_zeros("gz") * 6),
        "a large member": later("set.tar.gz", lambda: gz_members(tar_header("a.jpg", ZEROS // BLOCK * BLOCK))
                                + many_zeros("gz") + gz_members(bytes(1_024))),
        "one sample of 800 images": later("set.tar.gz", sample_of_many),
    },
    refused=frozenset({"long name", "long link", "long pax header", "long global header", "zeros after the end"}),
)  # fmt: skip
TAR_BZ2 = Reader(
    "tar_bz2", make_packed("bz2", bz2.compress), ("set.tar.bz2",), shard,
    hostile={
        "zeros after the end": later("set.tar.bz2", lambda: bz2.compress(
            tar_header("a.jpg", len(crops()[0])) + crops()[0].ljust(BLOCK * 40, b"\0")) + many_zeros("bz2") * 6),
        "a large member": later("set.tar.bz2", lambda: bz2.compress(tar_header("a.jpg", ZEROS // BLOCK * BLOCK))
                                + many_zeros("bz2") + bz2.compress(bytes(1_024))),
    },
    refused=frozenset({"zeros after the end"}),
)  # fmt: skip
TAR_XZ = Reader(
    "tar_xz", make_packed("xz", lzma.compress), ("set.tar.xz",), shard,
    hostile={
        "a dictionary of 1.5 GB": later("set.tar.xz", lambda: with_large_dictionary(
            tar_header("a.jpg", len(crops()[0])) + crops()[0].ljust(BLOCK * 40, b"\0") + bytes(1_024))),
        "a large member": later("set.tar.xz", lambda: lzma.compress(tar_header("a.jpg", ZEROS // BLOCK * BLOCK))
                                + many_zeros("xz") + lzma.compress(bytes(1_024))),
    },
    refused=frozenset({"a dictionary of 1.5 GB"}),
)  # fmt: skip

ALL = (ZIP, TAR, TAR_GZ, TAR_BZ2, TAR_XZ)
