"""Sources of crops as others make them, sound and hostile: images, zips, tars, parquet files, LMDBs, boxes."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import av
import cv2
import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, PngImagePlugin

from datapipe.__main__ import main
from datapipe.core import cli
from tests.datapipe.crop_set import jpegs
from tests.fuzz.reader import Make, Reader

BLOCK = 512


@cache
def crops() -> tuple[bytes, ...]:
    """Small JPEGs, as people find them."""
    return tuple(jpegs(6))


def shard(folder: Path, out: Path) -> int:
    """Ingest the one thing in the folder."""
    source = folder / "set" if (folder / "set").is_dir() else next(path for path in folder.iterdir())
    words = ["shard", str(source), "--out", str(out / "set"), "--workers", "1", "--max-bad", "1"]
    tried = cli.run(main, [*words, "--dry-run"])
    code = cli.run(main, words)
    if code == 0 and tried != 0:
        raise AssertionError("a dry run fails where the run does not")
    return code


def shard_all(folder: Path, out: Path) -> int:
    """Ingest a folder of images, of which none may be lost: each is kept, or in quarantine."""
    code = shard(folder, out)
    if code == 0:
        rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in out.glob("set/shards/*.parquet"))
        rows += pyarrow.parquet.read_metadata(out / "set" / "quarantine.parquet").num_rows
        found = len(list((folder / "set").iterdir()))
        if rows != found:
            raise AssertionError(f"{found} images became {rows} rows")
    return code


def written(name: str, data: bytes) -> Make:
    """One file of this content."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def later(name: str, data: Callable[[], bytes]) -> Make:
    """One file whose content is made when it is wanted."""
    return lambda folder: written(name, data())(folder)


# -------------------------------------------------------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def picture(height: int = 96, width: int = 48) -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def make_images(folder: Path) -> None:
    image, text = picture(), PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "baseline.jpg": encoded(image, "JPEG", quality=90),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "turned.jpg": encoded(image, "JPEG", exif=exif),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "text.png": encoded(image, "PNG", pnginfo=text),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "sixteen.png": encoded(Image.fromarray(np.arange(96 * 48, dtype=np.uint16).reshape(96, 48)), "PNG"),
        "plain.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "plain.gif": encoded(image.convert("P"), "GIF"),
        "plain.bmp": encoded(image, "BMP"),
        "raw.tif": encoded(image, "TIFF"),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "plain.ppm": encoded(image, "PPM"),
    }
    for name, data in made.items():
        written(f"set/{name}", data)(folder)


def many_scans(count: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    data = encoded(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    height: int, width: int, *, bits: int = 8, colour: int = 2, rows: int | None = None, extra: bytes = b""
) -> bytes:
    """A black PNG; `rows`: of which there are really data."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    channels = {0: 1, 2: 3, 6: 4}[colour]
    packer = zlib.compressobj(1)
    line = bytes(1 + width * channels * bits // 8)
    body = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def tiff(entries: Sequence[tuple[int, int, int, int]], *, after: int = 0) -> bytes:
    """A TIFF of these tags (tag, type, count, value) alone; `after`: where the next directory is."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", after) + bytes(4_096)


def tiled(side: int, compression: int) -> bytes:
    """A small TIFF whose only tile is large."""
    shape = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff([*shape, (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 200), (325, 4, 1, 2_000)])


def strange_files(folder: Path) -> None:
    """What is called as images are and is none: a pipe, a device, a file of 20 GB without content."""
    make_images(folder)
    os.mkfifo(folder / "set" / "pipe.jpg")
    (folder / "set" / "zero.jpg").symlink_to("/dev/zero")
    with open(folder / "set" / "holes.jpg", "wb") as file:
        file.truncate(20 << 30)


def named(folder: Path) -> None:
    """Names that a terminal would act on."""
    for number, name in enumerate(("\x1b]0;owned\x07.jpg", "a\rb.jpg", "a\nerror: forged.jpg", "\x9b31m.jpg")):
        written(f"set/{name}", crops()[number] if number % 2 else b"no image")(folder)


def among(name: str, data: Callable[[], bytes]) -> Make:
    """A hostile image among sound ones."""

    def make(folder: Path) -> None:
        written("set/sound.jpg", crops()[0])(folder)
        written(f"set/{name}", data())(folder)

    return make


def webp_canvas() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (16_382).to_bytes(3, "little") * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def many_frames() -> bytes:
    frames = [Image.new("P", (48, 96), number % 250) for number in range(400)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=1)


IMAGES = Reader(
    "images", make_images, ("set/*",), shard_all,
    hostile={
        "2,600 scans": among("x.jpg", lambda: many_scans(2_600)),
        "png of 4e9 pixels": among("x.png", lambda: png(65_000, 65_000, rows=1)),
        "png of 39e6 pixels": among("x.png", lambda: png(7_900, 4_950)),
        "png of 39e6 pixels of 16 bits": among("x.png", lambda: png(7_900, 4_950, bits=16, colour=0)),
        "png with 100 MB of text": among("x.png", lambda: png(96, 48, extra=png_chunk(
            b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1)))),
        "png with a profile of 100 MB": among("x.png", lambda: png(96, 48, extra=png_chunk(
            b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 1)))),
        "gif of many frames": among("x.gif", many_frames),
        "webp canvas": among("x.webp", webp_canvas),
        "tile of 4e9 bytes": among("x.tif", lambda: tiled(65_520, 1)),
        "tile of 4e9 bytes, lzw": among("x.tif", lambda: tiled(65_520, 5)),
        "tile of 1e9 bytes, deflate": among("x.tif", lambda: tiled(32_768, 8)),
        "tag of 4e9 values": among("x.tif", lambda: tiff([(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 2**32 - 1, 8)])),
        "directories in a circle": among("x.tif", lambda: tiff([(256, 3, 1, 64), (257, 3, 1, 64)], after=8)),
        "ppm of many digits": among("x.ppm", lambda: b"P6 " + b"9" * 6_000 + b" 1 255\n"),
        "bmp of 4e18 pixels": among("x.bmp", lambda: b"BM" + struct.pack(
            "<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)),
        "no files": strange_files,
        "names": named,
    },
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- zip


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


def make_tar_gz(folder: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, data in enumerate(crops()):
            add(tar, f"{'long' * 30}/{number:04d}_c1s1_{number:06d}_00.jpg", data)
    written("set.tar.gz", gzip.compress(sink.getvalue()))(folder)


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
    "tar_gz", make_tar_gz, ("set.tar.gz",), shard,
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


# ------------------------------------------------------------------------------------------------------------- parquet


def make_parquet(folder: Path) -> None:
    rows = [{"image": {"bytes": data, "path": f"{number}.jpg"}, "pid": number, "camera": 1}
            for number, data in enumerate(crops())]  # fmt: skip
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array([row["image"] for row in rows], kind),
                           "pid": [row["pid"] for row in rows], "camera": [1] * len(rows)})  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "set.parquet", row_group_size=4)


def one_value(rows: int, size: int) -> Make:
    """A parquet file of many rows that are one value, which lies in its dictionary."""

    def make(folder: Path) -> None:
        values = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array([b"\xff\xd8\xff" + bytes(size)], pyarrow.binary())
        )
        names = pyarrow.array(np.arange(rows))
        pyarrow.parquet.write_table(pyarrow.table({"image": values, "id": names}), folder / "set.parquet",
                                    compression="zstd", dictionary_pagesize_limit=1 << 30,
                                    row_group_size=rows)  # fmt: skip

    return make


def large_page(folder: Path) -> None:
    value = pyarrow.array([bytes(400_000_000)], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"image": value}), folder / "set.parquet", compression="zstd",
                                use_dictionary=False, write_statistics=False)  # fmt: skip


def empty_rows(folder: Path) -> None:
    table = pyarrow.table({"image": pyarrow.nulls(30_000_000, pyarrow.binary())})
    pyarrow.parquet.write_table(table, folder / "set.parquet", row_group_size=30_000_000)


def lying_footer(folder: Path) -> None:
    """The footer is said to take 2 GB."""
    make_parquet(folder)
    data = (folder / "set.parquet").read_bytes()
    (folder / "set.parquet").write_bytes(data[:-8] + (2**31 - 1).to_bytes(4, "little") + data[-4:])


PARQUET = Reader(
    "parquet", make_parquet, ("set.parquet",), shard,
    hostile={
        "dictionary": one_value(2_000, 20_000_000),
        "large page": large_page,
        "30e6 empty rows": empty_rows,
        "footer of 2 GB": lying_footer,
    },
    refused=frozenset({"30e6 empty rows", "large page", "dictionary"}),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- LMDB


def make_lmdb(folder: Path) -> None:
    keys = [f"1_1_{number // 2:04d}_{number:08d}" for number in range(len(crops()))]
    with lmdb.open(str(folder / "set"), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for key, data in zip(keys, crops(), strict=True):
            transaction.put(key.encode(), data)
    (folder / "set" / "lock.mdb").unlink()
    data = (folder / "set" / "data.mdb").read_bytes()
    (folder / "set" / "data.mdb").write_bytes(
        data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 4096) * 4096, b"\0")
    )
    (folder / "set" / "keys.pkl").write_bytes(pickle.dumps({"keys": keys, "pids": list(range(len(keys)))}))


def with_keys(pickled: Callable[[], bytes]) -> Make:
    """An LMDB with another keys.pkl."""

    def make(folder: Path) -> None:
        make_lmdb(folder)
        (folder / "set" / "keys.pkl").write_bytes(pickled())

    return make


def branches(folder: Path) -> None:
    """A tree whose branches lead to one empty leaf in 2^30 ways."""
    make_lmdb(folder)
    path = folder / "set" / "data.mdb"
    size, depth = 4096, 30
    data = bytearray(path.read_bytes()[: 2 * size])
    for number in range(2, 2 + depth):
        page = bytearray(size)
        nodes = [struct.pack("<4H", number + 1, 0, 0, len(key)) + key for key in (b"", b"m\0")]
        place = size
        starts = []
        for node in nodes:
            place -= len(node) + len(node) % 2
            page[place : place + len(node)] = node
            starts.append(place)
        page[:16] = struct.pack("<QHHHH", number, 0, 1, 16 + 2 * len(starts), place)
        page[16 : 16 + 2 * len(starts)] = struct.pack(f"<{len(starts)}H", *starts)
        data += page
    leaf = bytearray(size)
    leaf[:16] = struct.pack("<QHHHH", 2 + depth, 0, 2, 16, size)
    data += leaf
    for meta in (0, size):
        tree = meta + 40 + 48
        data[tree + 40 : tree + 48] = (2).to_bytes(8, "little")  # root
        data[tree + 32 : tree + 40] = (0).to_bytes(8, "little")  # entries
    path.write_bytes(bytes(data))
    (folder / "set" / "keys.pkl").unlink()


LONG_MEMO = b"\x80\x04]r" + (2**31 - 9).to_bytes(4, "little") + b"."
LMDB = Reader(
    "lmdb", make_lmdb, ("set/*",), shard,
    hostile={
        "memo": with_keys(lambda: LONG_MEMO),
        "memo in text": with_keys(lambda: b"(lp2000000000\n."),
        "many lists": with_keys(lambda: b"\x80\x04](" + b"]" * 20_000_000 + b"e."),
        "many sets": with_keys(lambda: b"\x80\x04](" + b"\x8f" * 10_000_000 + b"e."),
        "one key again and again": with_keys(
            lambda: b"\x80\x04](X" + (60_000).to_bytes(4, "little") + b"x" * 60_000 + b"2" * 2_000_000 + b"e."),
        "bytes of 4 GB": with_keys(lambda: b"\x80\x05\x96" + (1 << 32).to_bytes(8, "little") + b"."),
        "branches": branches,
    },
    refused=frozenset({"memo", "many lists", "many sets", "branches"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- boxes


def make_mot(folder: Path) -> None:
    for number in range(1, 4):
        written(f"set/seq/img1/{number:06d}.jpg", encoded(picture(120, 160), "JPEG"))(folder)
    lines = [f"{number},{number % 2 + 1},10,10,40,80,1,1,1.0" for number in (1, 1, 2, 3)]
    written("set/seq/gt/gt.txt", "\n".join(lines).encode())(folder)


def mot(line: str) -> Make:
    def make(folder: Path) -> None:
        make_mot(folder)
        (folder / "set" / "seq" / "gt" / "gt.txt").write_text(f"1,1,10,10,40,80,1,1,1.0\n{line}\n")

    return make


@cache
def video() -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(4):
            pixels = cv2.resize(np.asarray(picture(6 + number, 8)), (160, 120))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return sink.getvalue()


def boxes(**columns: object) -> Make:
    def make(folder: Path) -> None:
        written("set/v.mp4", video())(folder)
        usual = {"frame": [0, 1, 2], "track": [1, 1, 2], "box": [[5.0, 5.0, 50.0, 90.0]] * 3}
        pyarrow.parquet.write_table(pyarrow.table({**usual, **columns}), folder / "set" / "v.parquet")

    return make


def many_boxes(folder: Path) -> None:
    rows = 60_000_000
    written("set/v.mp4", video())(folder)
    zeros = pyarrow.array(np.zeros(rows, np.int8))
    table = pyarrow.table({name: zeros for name in ("frame", "x1", "y1", "x2", "y2")})
    pyarrow.parquet.write_table(table, folder / "set" / "v.parquet", compression="zstd", row_group_size=rows)


MOT = Reader(
    "mot", make_mot, ("set/seq/gt/*", "set/seq/img1/*"), shard,
    hostile={
        "track beyond int64": mot("2,1e30,10,10,40,80,1,1,1.0"),
        "track that floats do not hold": mot("2,9007199254740993,10,10,40,80,1,1,1.0"),
        "frame beyond int64": mot("1e25,1,10,10,40,80,1,1,1.0"),
        "box beyond all": mot("2,1,-1e300,10,1e301,80,1,1,1.0"),
        "not a number": mot("2,1,nan,10,40,80,1,1,1.0"),
        "a long line": mot("2," * 3_000_000),
    },
    refused=frozenset({"track beyond int64", "frame beyond int64", "not a number", "track that floats do not hold"}),
)  # fmt: skip
BOXES = Reader(
    "boxes", boxes(), ("set/v.parquet", "set/v.mp4"), shard,
    hostile={
        "track beyond int64": boxes(track=pyarrow.array([1.0, 1e30, 2.0])),
        "frame beyond all": boxes(frame=pyarrow.array([0, 1, 2**62])),
        "60e6 rows": many_boxes,
        "nulls": boxes(track=pyarrow.array([1, None, 2]), frame=pyarrow.array([0, None, 1])),
        "lists of other lengths": boxes(box=pyarrow.array([[1.0], [1.0] * 7, None])),
    },
    refused=frozenset({"track beyond int64", "60e6 rows", "nulls", "lists of other lengths"}),
)  # fmt: skip

ALL = (IMAGES, ZIP, TAR, TAR_GZ, PARQUET, LMDB, MOT, BOXES)
