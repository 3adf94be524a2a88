"""Ranked lists as pictures: the query, then its nearest gallery images, framed by whether they show the same person."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datapipe.core.config import Size

Picture = NDArray[np.uint8]
"""RGB [height, width, 3]."""

Colour = tuple[int, int, int]

TILE: Size = (192, 96)
"""(height, width) of one person, pixels; smaller aspect ratios are padded, never stretched."""
FRAME, GAP, TEXT = 5, 8, 15
RIGHT, WRONG, QUERY = (34, 160, 80), (214, 50, 50), (120, 120, 120)
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class Tile:
    """One gallery image of a ranked list."""

    image: Picture
    correct: bool
    caption: str


def ranked_list(query: Picture, query_caption: str, gallery: Sequence[Tile], title: str) -> Picture:
    """The query, then `gallery` in its order. Green frame and tick: same person; red frame and cross: another."""
    height, width = TILE
    step = width + 2 * FRAME + GAP
    top = GAP + TEXT + GAP
    canvas = Image.new("RGB", (GAP + step * (len(gallery) + 1) + GAP, top + height + 2 * FRAME + TEXT + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill=INK, font=_font())
    _paste(canvas, (GAP, top), query, QUERY, query_caption)
    for place, tile in enumerate(gallery, start=1):
        corner = (2 * GAP + step * place, top)
        _paste(canvas, corner, tile.image, RIGHT if tile.correct else WRONG, f"{place}  {tile.caption}")
        _mark(draw, corner, tile.correct)
    return np.asarray(canvas)


def to_jpeg(picture: Picture, quality: int = 85) -> bytes:
    """Encoded at `quality` (1..100), 4:4:4, so that thin frames stay sharp."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=quality, colorsubsampling="444")


def _paste(canvas: Image.Image, corner: tuple[int, int], image: Picture, colour: Colour, text: str) -> None:
    left, top = corner
    height, width = TILE
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + width + 2 * FRAME - 1, top + height + 2 * FRAME - 1), fill=colour)
    canvas.paste(_fitted(image), (left + FRAME, top + FRAME))
    draw.text((left, top + height + 2 * FRAME + GAP // 2), text, fill=INK, font=_font())


def _fitted(image: Picture) -> Image.Image:
    """Shrunk or enlarged into a tile at its own aspect ratio, on grey."""
    height, width = TILE
    scale = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    tile = Image.new("RGB", (width, height), (200, 200, 200))
    resized = Image.fromarray(image).resize(inner, Image.Resampling.BICUBIC)
    tile.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return tile


def _mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], correct: bool) -> None:
    """A tick or a cross, so that the colour is not all that tells."""
    left, top = corner[0] + FRAME, corner[1] + FRAME
    draw.rectangle((left, top, left + 17, top + 17), fill=RIGHT if correct else WRONG)
    if correct:
        draw.line([(left + 3, top + 9), (left + 7, top + 13), (left + 14, top + 4)], fill=PAPER, width=2)
    else:
        draw.line([(left + 4, top + 4), (left + 13, top + 13)], fill=PAPER, width=2)
        draw.line([(left + 4, top + 13), (left + 13, top + 4)], fill=PAPER, width=2)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=TEXT - 2)
