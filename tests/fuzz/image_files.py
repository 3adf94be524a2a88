"""Images as cameras, browsers and scanners make them, sound and hostile."""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.fuzz.reader import Make, Reader
from tests.fuzz.sources import crops, encoded, picture, shard_all, written


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


ALL = (IMAGES,)
