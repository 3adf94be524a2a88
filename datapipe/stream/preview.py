"""Contact sheets: crops of a data set, and the very views that training will see of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw
from pydantic import TypeAdapter, ValidationError

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError
from datapipe.core.randomness import Ints
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.storage import open_store, split_url
from datapipe.stream.stream import Stream
from datapipe.views.decode import decode
from datapipe.views.masking import draw_masks
from datapipe.views.render import make_views
from datapipe.views.spec import Band, View, ViewSpec

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
CROP_SIZE = 192, 96
"""(height, width) in pixels of the frame in which a whole crop is shown."""
GRID_COLUMNS = 10
MARGIN, LINE = 4, 12
"""Pixels between pictures, and of one line of text."""
HIDDEN = 127
"""Grey of patches that are hidden from the student."""
PAPER, INK = (255, 255, 255), (40, 40, 40)
OUTLINES = (230, 50, 40), (40, 110, 240), (30, 160, 70)
"""Colours of the boxes that views were cut from, in the order of the views."""

BAR = 6
"""Width of a band's bar, pixels."""

Picture = tuple[list[str], View]
"""Lines of text and the picture below them."""


@dataclass(frozen=True)
class TrainingViews:
    """What a training recipe sees: `python -m training views RECIPE` writes it as JSON, `preview --views` draws it."""

    spec: ViewSpec
    seed: int
    block: int
    window: int

    def to_json(self) -> str:
        return TypeAdapter(TrainingViews).dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str, *, where: str) -> "TrainingViews":
        """Views without a version are of earlier versions of this project, which had the first rule (`ViewConfig`).
        Raises ConfigError for anything that `to_json` did not write."""
        try:
            views = TypeAdapter(TrainingViews).validate_json(text)
        except ValidationError as error:
            hint = "write the file with `python -m training views RECIPE > views.json`"
            what = f"not a description of views: {error.errors()[0]['msg']}"
            raise ConfigError(what, where=where, hint=hint) from None
        if "version" in json.loads(text)["spec"]:
            return views
        return replace(views, spec=replace(views.spec, version=1))


def contact_sheet(
    manifest_url: str,
    out: str | Path,
    *,
    spec: ViewSpec | None = None,
    seed: int = 0,
    count: int = 20,
    storage: StorageConfig = StorageConfig(),  # noqa: B008  (frozen)
    stream: StreamConfig = StreamConfig(),  # noqa: B008  (frozen)
) -> str:
    """Draw the first `count` crops of the stream with this seed into `out` (.jpg or .png), and return it.

    With a spec, each crop has a row of its own with its views: exactly those that training makes of it at this place
    of the stream, patches that are hidden from the student in grey. Where the method knows which boxes its views were
    cut from, these are outlined on the crop, the first in red, the second in blue; bands of the body that views are cut
    from (PASS) are bars beside it. The caption names row, identity,
    camera (where known), height and width.
    """
    folder, name = split_url(str(out))
    kind = FORMATS.get(PurePosixPath(name).suffix.lower())
    if kind is None:
        raise ConfigError(f"a contact sheet is a .jpg or .png file, not {name!r}", hint="sheet.jpg")
    place = open_store(folder, storage)
    crops = Stream(Manifest.load(manifest_url, storage), storage, stream)
    order = Order(crops.rows, seed, stream.block, stream.window)
    positions = np.arange(min(count, crops.rows), dtype=np.int64)
    rows, data = crops.fetch(order.samples(positions))
    boxes = np.zeros((spec.boxed if spec else 0, len(data), 5), np.int64)
    views = _black(spec, len(data)) if spec else {}
    if spec is not None:
        make_views(data, spec, seed, positions, views, boxes)
        hide(views, spec, seed, positions)
    bands = body_bands(spec) if spec else ()
    pictures = [_whole(crops, row, data[place], boxes[:, place], bands) for place, row in enumerate(rows.tolist())]
    crops.close()
    if spec is None:
        lines = [pictures[low : low + GRID_COLUMNS] for low in range(0, len(pictures), GRID_COLUMNS)]
    else:
        lines = [[picture, *_row_of(views, row)] for row, picture in enumerate(pictures)]
    sink = BytesIO()
    _draw(lines).save(sink, kind, quality=90)
    place.replace(name, sink.getvalue())
    return str(out)


def hide(views: dict[str, View], spec: ViewSpec, seed: int, positions: Ints) -> None:
    """Grey out the patches that the student does not see: the first mask's in the first view, and so on."""
    if not spec.masks:
        return
    for stack, masks in zip(views[spec.groups[0].name], draw_masks(spec.masks, seed, positions), strict=False):
        height, width = stack.shape[1] // masks.shape[1], stack.shape[2] // masks.shape[2]
        stack[masks.repeat(height, axis=1).repeat(width, axis=2)] = HIDDEN


def view_sheet(views: dict[str, View], out: Path | None = None, *, count: int = 8, names: Sequence[str] = ()) -> bytes:
    """A JPEG of the views (uint8 [V, B, H, W, 3] by name) of the first `count` images, one row each.

    Also written to `out` if given. `names`: of the images, for the captions.
    """
    rows = min(count, *(array.shape[1] for array in views.values()))
    buffer = BytesIO()
    lines = [_row_of(views, row, names[row] if names else "") for row in range(rows)]
    _draw(lines).save(buffer, "JPEG", quality=90)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _black(spec: ViewSpec, count: int) -> dict[str, View]:
    return {group.name: np.zeros(spec.shape(group, count), np.uint8) for group in spec.groups}


def _row_of(views: dict[str, View], row: int, name: str = "") -> list[Picture]:
    """The views of one image; its name stands above the first one."""
    drawn = [([f"{group} {view}"], stack[row]) for group, array in views.items() for view, stack in enumerate(array)]
    return (
        [([name if not place else "", *text], picture) for place, (text, picture) in enumerate(drawn)]
        if name
        else drawn
    )


def body_bands(spec: ViewSpec) -> tuple[Band, ...]:
    """(top, bottom) of each band of the body that views are cut from, as shares of the height, the highest first; none
    where all are cut from the whole crop."""
    return tuple(sorted({band for group in spec.groups for band in group.bands if band != (0.0, 1.0)}))


def _whole(crops: Stream, row: int, jpeg: bytes, boxes: Ints, bands: Sequence[Band]) -> Picture:
    """The crop as it is stored, with its views' boxes and the body's bands; a black frame if it does not decode."""
    pid, camera = int(crops.pid[row]), int(crops.camera[row])
    known = " ".join([f"id {pid}"] * (pid != -1) + [f"cam {camera}"] * (camera != -1))
    try:
        image = decode(jpeg)
    except ValueError:
        return [f"crop {row}", known, "broken"], np.zeros((*CROP_SIZE, 3), np.uint8)
    return [f"crop {row}", known, f"{image.shape[0]} x {image.shape[1]}"], _banded(_outlined(image, boxes), bands)


def _outlined(image: View, boxes: Ints) -> View:
    """The whole crop in its frame with boxes [V, 5]: top, left, height, width in pixels of the image, flipped."""
    sheet = Image.fromarray(_fit(image))
    pen = ImageDraw.Draw(sheet)
    down, across = sheet.height / image.shape[0], sheet.width / image.shape[1]
    for (top, left, height, width, _), colour in zip(boxes.tolist(), OUTLINES, strict=False):
        corners = (left * across, top * down, (left + width) * across - 1, (top + height) * down - 1)
        pen.rectangle([round(corner) for corner in corners], outline=colour, width=2)
    return np.asarray(sheet)


def _banded(picture: View, bands: Sequence[Band]) -> View:
    """The picture with a bar for each band beside it, as bands overlap, and its edges as lines across the picture."""
    if not bands:
        return picture
    height, width = picture.shape[:2]
    sheet = Image.new("RGB", (width + BAR * len(bands), height), PAPER)
    sheet.paste(Image.fromarray(picture), (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (top, bottom) in enumerate(bands):
        colour, left = OUTLINES[number % len(OUTLINES)], width + BAR * number
        rows = (round(top * (height - 1)), round(bottom * (height - 1)))
        pen.rectangle((left + 2, rows[0], left + BAR - 2, rows[1]), fill=colour)
        for row in rows:
            pen.line((0, row, width - 1, row), fill=colour)
    return np.asarray(sheet)


def _fit(image: View) -> View:
    """The whole crop, scaled into the frame."""
    scale = min(CROP_SIZE[0] / image.shape[0], CROP_SIZE[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _draw(lines: list[list[Picture]]) -> Image.Image:
    """Pictures in lines, captions above, on paper just large enough; columns are as wide as their widest picture."""
    columns = max(len(line) for line in lines)
    wide = [max(max(line[at][1].shape[1] for line in lines if at < len(line)), 48) for at in range(columns)]
    tall = [max(len(text) * LINE + picture.shape[0] for text, picture in line) for line in lines]
    width = sum(wide) + MARGIN * (columns + 1)
    sheet = Image.new("RGB", (width, sum(tall) + MARGIN * (len(lines) + 1)), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for line, height in zip(lines, tall, strict=True):
        left = MARGIN
        for (text, picture), column in zip(line, wide, strict=False):
            for number, words in enumerate(text):
                pen.text((left, top + number * LINE - 1), words, fill=INK, font_size=10)
            sheet.paste(Image.fromarray(picture), (left, top + len(text) * LINE))
            left += column + MARGIN
        top += height + MARGIN
    return sheet
