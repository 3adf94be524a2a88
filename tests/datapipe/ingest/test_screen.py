"""Each image is kept as it is, re-encoded once, or quarantined with the right reason; Pillow is the judge."""

from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from datapipe.core.config import ShardConfig
from datapipe.ingest.screen import Kept, Reason, Refused, screen

HEIGHT, WIDTH = 96, 48
CONFIG = ShardConfig()
LENIENT = ShardConfig(min_size=(1, 1), max_aspect=10**6)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth, coloured, and not symmetric in any way."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kept(data: bytes) -> Kept:
    """Untouched; the luma is Pillow's."""
    return Kept(data, HEIGHT, WIDTH, luma(data))


def luma(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data))
    image.draft("L", image.size)
    return np.asarray(image.convert("L"))


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data))
    assert image.format == "JPEG" and image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_looks_like(verdict: Kept | Refused, wanted: Image.Image) -> None:
    assert isinstance(verdict, Kept), verdict
    expected = np.asarray(wanted.convert("RGB")).astype(int)
    assert (verdict.height, verdict.width) == expected.shape[:2]
    assert np.abs(pixels(verdict.data) - expected).mean() < 4


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}, {"optimize": True}, {"comment": b"x" * 300}],
)
def test_screen__keeps_sane_jpegs_byte_for_byte(options: dict[str, Any]) -> None:
    data = encoded(picture(), "JPEG", **options)
    assert screen(data, CONFIG) == kept(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_screen__turns_jpegs_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "JPEG", exif=exif, quality=95)
    verdict = screen(data, CONFIG)
    turned = Image.open(BytesIO(data))
    assert_looks_like(verdict, ImageOps.exif_transpose(turned))
    assert isinstance(verdict, Kept) and (verdict.data == data) == (orientation == 1)
    assert Image.open(BytesIO(verdict.data)).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("P", "GIF"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PPM"),
    ],
)
def test_screen__encodes_other_images_once(mode: str, kind: str) -> None:
    image = picture().quantize(200, dither=Image.Dither.NONE) if mode == "P" else picture().convert(mode)
    assert_looks_like(screen(encoded(image, kind), CONFIG), image)


def test_screen__scales_sixteen_bits() -> None:
    grey = np.asarray(picture().convert("L"))
    data = encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert_looks_like(screen(data, CONFIG), Image.fromarray(grey))


def test_screen__encodes_the_same_way_every_time() -> None:
    data = encoded(picture(), "PNG")
    assert screen(data, CONFIG) == screen(data, CONFIG)
    low = screen(data, ShardConfig(jpeg_quality=20))
    assert isinstance(low, Kept) and len(low.data) < len(screen(data, CONFIG).data)  # type: ignore[union-attr]


def broken(data: bytes, place: float) -> bytes:
    """The data with some bytes in the midst of the compressed image overwritten by what means nothing there."""
    middle = int(len(data) * place)
    return data[:middle] + b"\xff\xc4\x00\x05\xff\xff\xff" + data[middle + 7 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.NOT_AN_IMAGE),
        (b"<html>not here</html>", Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 48\n", Reason.NOT_AN_IMAGE),
        (encoded(picture(), "JPEG")[:-300], Reason.CUT),
        (encoded(picture(), "JPEG")[:100], Reason.CUT),
        (encoded(picture(), "JPEG", progressive=True)[:-200], Reason.CUT),
        (encoded(picture(), "PNG")[:-300], Reason.CUT),
        (broken(encoded(picture(), "JPEG"), 0.7), Reason.CORRUPT),
        (broken(encoded(picture(), "PNG"), 0.5), Reason.CORRUPT),
        (encoded(picture(31, 31), "JPEG"), Reason.TOO_SMALL),
        (encoded(picture(100, 11), "PNG"), Reason.TOO_SMALL),
        (encoded(picture(400, 40), "JPEG"), Reason.ABSURD_ASPECT),
        (encoded(picture(40, 400), "PNG"), Reason.ABSURD_ASPECT),
        (encoded(Image.new("1", (7000, 7000)), "PNG"), Reason.BOMB),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), Reason.BOMB),
        (encoded(Image.new("L", (7000, 7000)), "JPEG"), Reason.BOMB),
        (encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(180)]), Reason.ANIMATED),
    ],
    ids=lambda value: str(value) if isinstance(value, Reason) else "",
)
def test_screen__names_the_reason(data: bytes, reason: Reason) -> None:
    verdict = screen(data, CONFIG)
    assert isinstance(verdict, Refused) and verdict.reason == reason, verdict


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"optimize": True},
        {"restart_marker_blocks": 2},
    ],
)
@settings(max_examples=60, deadline=None)
@given(damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3), kept_share=st.floats(0.9, 1))
def test_screen__finds_in_grey_all_that_colours_would_show(
    options: dict[str, Any], damage: list[tuple[float, int]], kept_share: float
) -> None:
    """The chroma is not made into pixels; a fault in it must not go unseen."""
    data = bytearray(encoded(picture(), "JPEG", **options))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    data = data[: round(kept_share * len(data))]
    try:
        height, width = simplejpeg.decode_jpeg(bytes(data), colorspace="RGB", strict=True).shape[:2]
    except ValueError:
        assert isinstance(screen(bytes(data), LENIENT), Refused)
    else:
        verdict = screen(bytes(data), LENIENT)
        assert isinstance(verdict, Kept) and (verdict.height, verdict.width) in ((height, width), (width, height))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize(("count", "told"), [(2, "2 frames"), (100, "100 frames"), (103, "more than 100 frames")])
def test_screen__counts_frames(kind: str, count: int, told: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (count, 96, 48, 3), dtype=np.uint8)
    pages = [Image.fromarray(page) for page in noise]
    refused = screen(encoded(pages[0], kind, save_all=True, append_images=pages[1:]), ShardConfig())
    assert isinstance(refused, Refused) and (refused.reason, refused.detail) == (Reason.ANIMATED, told)


def test_screen__judges_size_as_seen() -> None:
    """A crop that lies on its side is measured upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    config = ShardConfig(min_size=(80, 20))
    data = encoded(picture(40, 90), "JPEG", exif=exif)
    verdict = screen(data, config)
    assert isinstance(verdict, Kept) and (verdict.height, verdict.width) == (90, 40)


def test_screen__ignores_metadata_that_cannot_be_read() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrubbish")
    assert screen(data, CONFIG) == kept(data)
