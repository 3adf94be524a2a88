"""Images lie as Pillow's exif_transpose shows them, wherever orientation stands; bits and kinds of files are told."""

import io
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from datapipe.formats.images import Reason, Undecodable, decode_image

HEIGHT, WIDTH = 40, 24
ORIENTATIONS = range(1, 9)


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, coloured, and not symmetric in any way."""
    coarse = np.random.default_rng(5).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    record = Image.Exif()
    record[0x0112] = orientation
    return record.tobytes()


def xmp(orientation: int, *, as_element: bool = False) -> bytes:
    told = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if as_element else ""
    attribute = "" if as_element else f' tiff:Orientation="{orientation}"'
    return (f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description{attribute}>{told}</rdf:Description>'
            "</rdf:RDF></x:xmpmeta>").encode()  # fmt: skip


def segment(marker: int, payload: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


EXTENDED_XMP = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32 + bytes(8) + b"x" * 60_000)
ICC = segment(0xE2, b"ICC_PROFILE\0\1\2" + b"p" * 65_000) + segment(0xE2, b"ICC_PROFILE\0\2\2" + b"p" * 65_000)


def jpeg_with(before: bytes, orientation: int) -> bytes:
    """A JPEG whose Exif comes after other segments."""
    base = encoded(picture(), "JPEG", quality=95)
    return base[:2] + before + segment(0xE1, b"Exif\0\0" + exif(orientation).removeprefix(b"Exif\0\0")) + base[2:]


def png_text(key: str, text: str, **options: Any) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text, **options) if key.startswith("XML") else info.add_text(key, text, **options)
    return info


def raw_profile(orientation: int) -> str:
    data = exif(orientation)
    return f"\nexif\n{len(data):8}\n{data.hex()}\n"


def exif_behind_the_pixels(orientation: int) -> bytes:
    """A PNG whose eXIf stands after its IDAT, as the format allows."""
    data = encoded(picture(), "PNG", exif=exif(orientation))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    return data[:start] + data[end:last] + data[start:end] + data[last:]


PLACES: dict[str, Callable[[int], bytes]] = {
    "jpeg, exif": lambda o: encoded(picture(), "JPEG", exif=exif(o), quality=95),
    "jpeg, exif behind extended xmp": lambda o: jpeg_with(EXTENDED_XMP * 2, o),
    "jpeg, exif behind an icc profile": lambda o: jpeg_with(ICC, o),
    "jpeg, exif behind a comment": lambda o: jpeg_with(segment(0xFE, b"c" * 65_000) * 2, o),
    "jpeg, xmp": lambda o: encoded(picture(), "JPEG", xmp=xmp(o), quality=95),
    "jpeg, xmp as element": lambda o: encoded(picture(), "JPEG", xmp=xmp(o, as_element=True), quality=95),
    "jpeg, xmp against exif": lambda o: encoded(picture(), "JPEG", xmp=xmp(1 + o % 8), exif=exif(o), quality=95),
    "jpeg, grey": lambda o: encoded(picture("L"), "JPEG", exif=exif(o), quality=95),
    "jpeg, cmyk": lambda o: encoded(picture("CMYK"), "JPEG", exif=exif(o), quality=95),
    "mpo": lambda o: encoded(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")],
                             exif=exif(o), quality=95),
    "png, exif": lambda o: encoded(picture(), "PNG", exif=exif(o)),
    "png, exif behind the pixels": exif_behind_the_pixels,
    "png, xmp": lambda o: encoded(picture(), "PNG", pnginfo=png_text("XML:com.adobe.xmp", xmp(o).decode())),
    "png, raw profile": lambda o: encoded(picture(), "PNG",
                                          pnginfo=png_text("Raw profile type exif", raw_profile(o), zip=True)),
    "png, palette": lambda o: encoded(picture().quantize(60), "PNG", exif=exif(o)),
    "png, 16 bits": lambda o: encoded(Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257), "PNG",
                                      exif=exif(o)),
    "webp, exif": lambda o: encoded(picture(), "WEBP", exif=exif(o), quality=95),
    "webp, xmp": lambda o: encoded(picture(), "WEBP", xmp=xmp(o), lossless=True),
    "tiff": lambda o: encoded(picture(), "TIFF", tiffinfo={274: o}),
    "tiff, lzw": lambda o: encoded(picture(), "TIFF", tiffinfo={274: o}, compression="tiff_lzw"),
    "tiff, jpeg": lambda o: encoded(picture(), "TIFF", tiffinfo={274: o}, compression="jpeg", quality=95),
    "tiff, grey": lambda o: encoded(picture("L"), "TIFF", tiffinfo={274: o}),
    "tiff, 16 bits": lambda o: encoded(Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257), "TIFF",
                                       tiffinfo={274: o}),
    "tiff, xmp": lambda o: encoded(picture(), "TIFF", tiffinfo={700: xmp(o)}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_decode__lies_as_pillow_shows_it(place: str) -> None:
    for orientation in ORIENTATIONS:
        data = PLACES[place](orientation)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        wanted = np.asarray(shown).astype(int) >> 8 if shown.mode.startswith("I") else np.asarray(shown.convert("RGB"))
        if wanted.ndim == 2:
            wanted = np.repeat(wanted[..., None], 3, axis=2)
        pixels = decode_image(data)
        assert pixels.shape == wanted.shape, orientation
        assert np.abs(pixels.astype(int) - wanted).mean() < 2, orientation


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_decode__passes_over_orientations_that_are_none(orientation: int) -> None:
    assert decode_image(encoded(picture(), "JPEG", exif=exif(orientation))).shape == (HEIGHT, WIDTH, 3)
    assert decode_image(encoded(picture(), "PNG", exif=b"Exif\0\0broken")).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("lying", [(1, 6), (6, 1)])
def test_decode__checks_the_size_as_it_is_seen(lying: tuple[int, int]) -> None:
    sizes: list[tuple[int, int]] = []
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation in lying:
            decode_image(encoded(picture(), kind, exif=exif(orientation)), sizes.append)
    for orientation in lying:
        decode_image(encoded(picture(), "TIFF", tiffinfo={274: orientation}), sizes.append)
    upright = [(HEIGHT, WIDTH) if orientation == 1 else (WIDTH, HEIGHT) for orientation in lying]
    assert sizes == upright * 4


# ------------------------------------------------------------------------------------------------------- bit depth


def scaled(bits: int, *, colour: bool) -> np.ndarray:
    values = np.asarray(picture() if colour else picture("L")).astype(float)
    values *= 255 / values.max()  # a picture that takes all of its range
    return np.rint(values / 255 * ((1 << bits) - 1)).astype(np.uint16)


def cv2_encoded(ending: str, values: np.ndarray, *options: int) -> bytes:
    done, data = cv2.imencode(ending, values[..., ::-1] if values.ndim == 3 else values, list(options))
    assert done
    return bytes(data)


def with_alpha(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full_like(values[..., :1], 65_535), values], axis=2)  # reversed by cv2_encoded


WIDE = {
    "grey png": (False, partial(cv2_encoded, ".png")),
    "colour png": (True, partial(cv2_encoded, ".png")),
    "png with alpha": (True, lambda values: cv2_encoded(".png", with_alpha(values))),
    "grey tiff": (False, lambda values: cv2_encoded(".tif", values, cv2.IMWRITE_TIFF_COMPRESSION, 1)),
    "colour tiff": (True, lambda values: cv2_encoded(".tif", values, cv2.IMWRITE_TIFF_COMPRESSION, 1)),
    "colour tiff, lzw": (True, lambda values: cv2_encoded(".tif", values, cv2.IMWRITE_TIFF_COMPRESSION, 5)),
    "tiff of 32 bits": (False, lambda values: encoded(Image.fromarray(values.astype(np.int32)), "TIFF")),
}


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", WIDE)
def test_decode__scales_values_by_their_real_range(kind: str, bits: int) -> None:
    colour, encode = WIDE[kind]
    wanted = scaled(8, colour=colour)
    pixels = decode_image(encode(scaled(bits, colour=colour)))
    assert np.abs(pixels.astype(int) - (wanted if colour else wanted[..., None])).max() <= 1


@pytest.mark.parametrize("maximum", [255, 1023, 4095, 65_535])
def test_decode__scales_portable_pixmaps_by_their_header(maximum: int) -> None:
    grey = np.rint(scaled(8, colour=False) / 255 * maximum / 20)  # dark, but the header tells the range
    data = f"P5 {WIDTH} {HEIGHT} {maximum}\n".encode() + grey.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    if maximum < 65_535:  # which most programs write, whatever the range
        assert abs(decode_image(data).mean() - scaled(8, colour=False).mean() / 20) < 1.5
    else:
        assert decode_image(data).max() > 64


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (encoded(Image.fromarray(np.linspace(0, 1, 96, dtype=np.float32).reshape(12, 8)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.arange(-48, 48, dtype=np.int32).reshape(12, 8)), "TIFF"), "white"),
        (encoded(Image.fromarray(np.arange(96, dtype=np.int32).reshape(12, 8) * 10_000), "TIFF"), "white"),
    ],
)
def test_decode__says_that_a_range_is_unknown(data: bytes, told: str) -> None:
    with pytest.raises(Undecodable, match=told) as raised:
        decode_image(data)
    assert raised.value.reason == Reason.UNSUPPORTED


# ------------------------------------------------------------------------------------------------------- true reasons


def png_with(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A sound PNG with another chunk before its pixels; with a wrong checksum where one is given."""
    data = encoded(picture(), "PNG")
    place = data.index(b"IDAT") - 4
    checksum = zlib.crc32(kind + content) if crc is None else crc
    chunk = len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")
    return data[:place] + chunk + data[place:]


MUCH = zlib.compress(b"y" * 3_000_000)


@pytest.mark.parametrize(
    "data",
    [
        png_with(b"gAMA", bytes([0, 0, 177, 143]), 0),
        png_with(b"tEXt", b"note\0hello", 0),
        png_with(b"zTXt", b"note\0\0" + MUCH),
        png_with(b"iTXt", b"note\0\1\0\0\0" + MUCH),
        png_with(b"iTXt", b"note\0\1\0\0\0not compressed"),
        png_with(b"tIME", b"short"),
        png_with(b"zzZz", b"private"),
    ],
    ids=["checksum", "checksum of a text", "much text", "much international text", "broken text", "time", "private"],
)
def test_decode__reads_pngs_whatever_stands_beside_their_pixels(data: bytes) -> None:
    assert (decode_image(data) == np.asarray(picture())).all()


def with_precision(bits: int, marker: bytes = b"\xff\xc0") -> bytes:
    data = encoded(picture(), "JPEG")
    place = data.index(b"\xff\xc0")
    return data[:place] + marker + data[place + 2 : place + 4] + bytes([bits]) + data[place + 5 :]


@pytest.mark.parametrize(
    ("data", "reason", "told"),
    [
        (encoded(picture(), "AVIF"), Reason.UNSUPPORTED, "AVIF"),
        (encoded(picture(), "JPEG2000"), Reason.UNSUPPORTED, "JPEG 2000"),
        (encoded(picture(), "JPEG2000", no_jp2=True), Reason.UNSUPPORTED, "JPEG 2000"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), Reason.UNSUPPORTED, "HEIC"),
        (b"\xff\x0a" + bytes(100), Reason.UNSUPPORTED, "JPEG XL"),
        (encoded(picture(), "ICO"), Reason.UNSUPPORTED, "icon"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', Reason.UNSUPPORTED, "SVG"),
        (with_precision(12, b"\xff\xc1"), Reason.UNSUPPORTED, "12 bits"),
        (with_precision(8, b"\xff\xc3"), Reason.UNSUPPORTED, "lossless"),
        (b"<!DOCTYPE html><html>quota</html>", Reason.NOT_AN_IMAGE, "HTML"),
        (b"\xef\xbb\xbf\n<html>quota</html>", Reason.NOT_AN_IMAGE, "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", Reason.NOT_AN_IMAGE, "object store"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", Reason.NOT_AN_IMAGE, "LFS"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(80), Reason.NOT_AN_IMAGE, "AppleDouble"),
        (b"PK\x03\x04" + bytes(60), Reason.NOT_AN_IMAGE, "zip"),
        (b"", Reason.NOT_AN_IMAGE, "empty"),
        (bytes(5_000), Reason.NOT_AN_IMAGE, "zeros"),
        (b"\x8f\x01" * 300, Reason.NOT_AN_IMAGE, "no known format"),
    ],
)  # fmt: skip
def test_decode__says_what_a_file_is(data: bytes, reason: Reason, told: str) -> None:
    with pytest.raises(Undecodable, match=told) as raised:
        decode_image(data)
    assert raised.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"])
def test_decode__refuses_what_is_cut(kind: str) -> None:
    data = encoded(picture(), kind)
    with pytest.raises(Undecodable) as raised:
        decode_image(data[: len(data) // 2])
    assert raised.value.reason in (Reason.CUT, Reason.CORRUPT)
