"""JPEG bytes -> named uint8 views, always height x width: decode once, crop, resize, flip, colour.

This is the one implementation: what `preview` shows is what training sees. Normalisation is left to the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from datapipe import boxes, photometric
from datapipe.config import Range, Size, ViewConfig
from datapipe.photometric import Photometric, View
from datapipe.randomness import Floats, Ints, draw

cv2.setNumThreads(0)  # the loader's threads are the parallelism; cv2's own pool would fight them

Band = tuple[float, float]
"""(top, bottom) as shares of the image's height; (0, 1) is the whole image."""


@dataclass(frozen=True)
class ViewGroup:
    """Views of one size: out[name] is uint8 [views, batch, height, width, 3].

    `scale` is the crop's area as a share of its band, `ratio` its width over height, `flip` a probability; `bands`
    and `photometric` have one entry per view.
    """

    name: str
    size: Size
    scale: Range
    ratio: Range
    flip: float
    bands: tuple[Band, ...]
    photometric: tuple[Photometric, ...]

    def __post_init__(self) -> None:
        if len(self.bands) != len(self.photometric):
            raise ValueError(f"{self.name}: {len(self.bands)} bands but {len(self.photometric)} photometric settings")


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image, group by group. Picklable; methods make it, the loader carries it out."""

    groups: tuple[ViewGroup, ...]
    interpolation: Literal["bicubic", "linear"] = "bicubic"

    def shape(self, group: ViewGroup, batch: int) -> tuple[int, int, int, int, int]:
        """[views, batch, height, width, 3]."""
        return len(group.bands), batch, *group.size, 3


def multi_crop(config: ViewConfig, *, size: Size, local_size: Size, local_bands: tuple[Band, ...]) -> ViewSpec:
    """Two "global" views of the whole image and one "local" view per band (DINO: all (0, 1); PASS: three thirds)."""
    first, second, local = (
        Photometric(
            jitter=config.jitter,
            grey=config.grey,
            blur=config.blur[kind],
            solarise=config.solarise[kind],
            erase=config.erase[kind],
            blur_sigma=config.blur_sigma,
            erase_area=config.erase_area,
        )
        for kind in range(3)
    )
    whole: Band = (0.0, 1.0)
    pair = ViewGroup(
        name="global",
        size=size,
        scale=config.global_scale,
        ratio=config.global_ratio,
        flip=config.flip,
        bands=(whole, whole),
        photometric=(first, second),
    )
    small = ViewGroup(
        name="local",
        size=local_size,
        scale=config.local_scale,
        ratio=config.local_ratio,
        flip=config.flip,
        bands=local_bands,
        photometric=(local,) * len(local_bands),
    )
    return ViewSpec(groups=(pair, small) if local_bands else (pair,), interpolation=config.interpolation)


def make_views(jpegs: list[bytes], spec: ViewSpec, seed: int, positions: Ints, out: dict[str, View]) -> list[int]:
    """Fill out[group][view, row] for every image; returns the rows whose bytes are no image (left as they were).

    Everything random is a function of (seed, position, group, view, operation). Views of a bad row can be made
    later from a substitute, with the position of the row.
    """
    decoded = [_decode(data) for data in jpegs]
    bad = [row for row, image in enumerate(decoded) if image is None]
    good = [row for row, image in enumerate(decoded) if image is not None]
    images = [image for image in decoded if image is not None]
    if images:
        targets = {name: [[stack[row] for row in good] for stack in array] for name, array in out.items()}
        _fill(images, spec, draw(seed, _numbers_needed(spec), positions[good]), targets)
    return bad


def decode(data: bytes) -> View:
    """RGB uint8 [H, W, 3]; ValueError if the bytes are no image, or one that ends early."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except (ValueError, RuntimeError):
        pass  # CMYK, or not a JPEG at all: PIL reads more, slowly
    try:
        with Image.open(BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image: {error}") from error


def _decode(data: bytes) -> View | None:
    try:
        return decode(data)
    except ValueError:
        return None


@lru_cache(maxsize=16)
def _numbers_needed(spec: ViewSpec) -> dict[str, int]:
    """Purpose -> uniform numbers per image."""
    needed = {}
    for group in spec.groups:
        for view, colours in enumerate(group.photometric):
            purpose = f"views/{group.name}/{view}"
            needed[f"{purpose}/crop"] = boxes.NUMBERS
            needed[f"{purpose}/flip"] = 1
            for operation, count in photometric.numbers_needed(colours).items():
                needed[f"{purpose}/{operation}"] = count
    return needed


def _fill(images: list[View], spec: ViewSpec, unit: dict[str, Floats], targets: dict[str, list[list[View]]]) -> None:
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    sources: list[Any] = images
    resize: Callable[[Any, list[int], View], None] = _resize_linear
    if spec.interpolation == "bicubic":
        sources, resize = [Image.fromarray(image) for image in images], _resize_bicubic
    for group in spec.groups:
        for view, (band, colours) in enumerate(zip(group.bands, group.photometric, strict=True)):
            purpose = f"views/{group.name}/{view}"
            crops = _crops(unit[f"{purpose}/crop"], sizes, band, group).tolist()
            flips = (unit[f"{purpose}/flip"][:, 0] < group.flip).tolist()
            mine = {name: unit[f"{purpose}/{name}"] for name in photometric.numbers_needed(colours)}
            steps = photometric.plan(colours, mine, group.size, len(images))
            for source, box, flip, todo, target in zip(
                sources, crops, flips, steps, targets[group.name][view], strict=True
            ):
                resize(source, box, target)
                if flip:
                    cv2.flip(target, 1, dst=target)
                for operation, argument in todo:
                    operation(target, argument)


def _crops(unit: Floats, sizes: Ints, band: Band, group: ViewGroup) -> Ints:
    """Boxes in the image; the band's rows are cut as the reference does (PASS/main_pass.py:575-589)."""
    height, width = sizes[:, 0], sizes[:, 1]
    top = np.minimum((height * band[0]).astype(np.int64), height - 1)
    bottom = np.maximum((height * band[1]).astype(np.int64), top + 1)
    found = boxes.crops(unit, bottom - top, width, group.scale, group.ratio)
    found[:, 0] += top
    return found


def _resize_linear(image: View, box: list[int], target: View) -> None:
    """Area when both sides shrink, linear otherwise: a mean difference of .2 to 1.5 of 255 from antialiased bicubic."""
    top, left, height, width = box
    shrinks = height > target.shape[0] and width > target.shape[1]
    piece = image[top : top + height, left : left + width]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(piece, (target.shape[1], target.shape[0]), dst=target, interpolation=method)


def _resize_bicubic(image: Image.Image, box: list[int], target: View) -> None:
    """Torchvision's resized_crop on a PIL image: crop first, so that nothing beyond the box is seen."""
    top, left, height, width = box
    piece = image.crop((left, top, left + width, top + height))
    target[...] = np.asarray(piece.resize((target.shape[1], target.shape[0]), Image.Resampling.BICUBIC))
