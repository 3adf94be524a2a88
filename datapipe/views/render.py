"""JPEG bytes -> named uint8 views, always height x width: decode once, crop, resize, flip, colour.

This is the one implementation: what `preview` shows is what training sees. Normalisation is left to the device.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
from PIL import Image

from datapipe.core.randomness import Floats, Ints, draw
from datapipe.views import bicubic, photometric
from datapipe.views import crop_boxes as cuts
from datapipe.views.bicubic import Resize
from datapipe.views.decode import decode_runs
from datapipe.views.spec import REDRAWS, VERSION_OF_BICUBIC, Band, View, ViewGroup, ViewSpec

cv2.setNumThreads(0)  # the loader's threads are the parallelism; cv2's own pool would fight them


def make_views(
    jpegs: list[bytes], spec: ViewSpec, seed: int, positions: Ints, out: dict[str, View], boxes: Ints | None = None, *,
    resize: Resize = bicubic.resize,
) -> list[int]:  # fmt: skip
    """Fill out[group][view, row] for every image; returns the rows whose bytes are no image (left as they were).

    `boxes` [spec.boxed, n, 5], if given, gets the boxed views' (top, left, height, width) in the image and whether they
    are flipped. `resize` carries out bicubic resizing by version 3 of the rules: another way to the same bytes.
    Everything random is a function of (seed, position, group, view, operation). Views of a bad row can be made
    later from a substitute, with the position of the row.
    """
    bad: list[int] = []
    for first, decoded in decode_runs(jpegs):
        good = [row for row, image in enumerate(decoded, first) if image is not None]
        bad += [row for row, image in enumerate(decoded, first) if image is None]
        images = [image for image in decoded if image is not None]
        if images:
            targets = {name: [[stack[row] for row in good] for stack in array] for name, array in out.items()}
            view_boxes = _fill(images, spec, draw(seed, _numbers_needed(spec), positions[good]), targets, resize)
            if boxes is not None:
                boxes[:, good] = view_boxes
    return bad


@lru_cache(maxsize=16)
def _numbers_needed(spec: ViewSpec) -> dict[str, int]:
    """Purpose -> uniform numbers per image."""
    needed = {}
    for group in spec.groups:
        for view, colours in enumerate(group.photometric):
            purpose = f"views/{group.name}/{view}"
            needed[f"{purpose}/crop"] = cuts.NUMBERS * _draws(group) if group.pad is None else 2
            needed[_flip_purpose(group, view)] = 1
            for operation, count in photometric.numbers_needed(colours).items():
                needed[f"{purpose}/{operation}"] = count
    return needed


def _draws(group: ViewGroup) -> int:
    return REDRAWS if group.near else 1


def _flip_purpose(group: ViewGroup, view: int) -> str:
    return f"views/flip/{group.flip_with}" if group.flip_with else f"views/{group.name}/{view}/flip"


def _fill(
    images: list[View], spec: ViewSpec, unit: dict[str, Floats], targets: dict[str, list[list[View]]], resize: Resize
) -> Ints:
    """Make the views in place; returns the boxes of the boxed ones, [spec.boxed, n, 5].

    All that is random is planned first, for all images at once; then each image gets all of its views in turn, while it
    is in the core's cache.
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    sources: Iterable[Any] = images
    resize_box: Callable[[Any, list[int], View], None] = _resize_linear
    if spec.interpolation == "bicubic" and spec.version >= VERSION_OF_BICUBIC:
        resize_box = partial(_resize_box, resize)
    elif spec.interpolation == "bicubic":
        sources, resize_box = map(Image.fromarray, images), _resize_by_pillow
    cut: dict[str, Ints] = {}
    plans = []
    view_boxes = [np.empty((0, len(images), 5), dtype=np.int64)]
    for group in spec.groups:
        for view, (band, colours) in enumerate(zip(group.bands, group.photometric, strict=True)):
            purpose = f"views/{group.name}/{view}"
            numbers = unit[f"{purpose}/crop"]
            tops, rows = band_rows(sizes[:, 0], band, spec.version)
            areas = np.stack([tops, rows, sizes[:, 1]])
            crops = _crops(numbers, areas, group, cut.get(group.near)) if group.pad is None else _whole(sizes)
            flips = unit[_flip_purpose(group, view)][:, 0] < group.flip
            cut.setdefault(group.name, crops)
            if group.boxed:
                view_boxes.append(np.concatenate([crops, flips[:, None]], axis=1)[None])
            mine = {name: unit[f"{purpose}/{name}"] for name in photometric.numbers_needed(colours)}
            steps = photometric.plan(colours, mine, group.size, len(images))
            if group.pad is not None:
                moves = np.floor(numbers * (2 * group.pad + 1)).astype(np.int64) - group.pad
                steps = [[(_move, move), *todo] for move, todo in zip(moves.tolist(), steps, strict=True)]
            plans.append(zip(targets[group.name][view], crops.tolist(), flips.tolist(), steps, strict=True))
    for source, *views in zip(sources, *plans, strict=True):
        for target, box, flip, todo in views:
            resize_box(source, box, target)
            if flip:
                cv2.flip(target, 1, dst=target)
            for operation, argument in todo:
                operation(target, argument)
    return np.concatenate(view_boxes)


def band_rows(height: Ints, band: Band, version: int) -> tuple[Ints, Ints]:
    """First row, and number of rows, of a band of images [n] of these heights, pixels; at least one row. Version 2
    and later have the reference's rule (PASS `main_pass.py`, DataAugmentationDINO), 1 has an earlier one:

        2:  top = floor(band[0] H)   rows = floor((band[1] - band[0]) H)
        1:  top = floor(band[0] H)   rows = floor(band[1] H) - top
    """
    top = np.minimum((height * band[0]).astype(np.int64), height - 1)
    if version == 1:
        rows = (height * band[1]).astype(np.int64) - top
    else:
        rows = np.minimum((height * (band[1] - band[0])).astype(np.int64), height - top)
    return top, np.maximum(rows, 1)


def _crops(unit: Floats, areas: Ints, group: ViewGroup, other: Ints | None) -> Ints:
    """Boxes in the image, cut from areas of it [3, n]: first row, rows, and columns from the first one on."""
    top, height, width = areas
    tries = np.split(unit, _draws(group), axis=1)
    tried = np.stack([cuts.crops(numbers, height, width, group.scale, group.ratio) for numbers in tries])
    tried[..., 0] += top
    return tried[0] if other is None else cuts.nearest(tried, other, group.iou)


def _whole(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def _move(target: View, by: list[int]) -> None:
    """Rows down and columns to the right, black where nothing is."""
    matrix = np.array([[1, 0, by[1]], [0, 1, by[0]]], dtype=np.float64)
    target[...] = cv2.warpAffine(target, matrix, (target.shape[1], target.shape[0]), flags=cv2.INTER_NEAREST)


def _resize_linear(image: View, box: list[int], target: View) -> None:
    """Area when both sides shrink, linear otherwise: a mean difference of .2 to 1.5 of 255 from antialiased bicubic."""
    top, left, height, width = box
    shrinks = height > target.shape[0] and width > target.shape[1]
    piece = image[top : top + height, left : left + width]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(piece, (target.shape[1], target.shape[0]), dst=target, interpolation=method)


def _resize_box(resize: Resize, image: View, box: list[int], target: View) -> None:
    """Crop first, so that nothing beyond the box is seen."""
    top, left, height, width = box
    resize(image[top : top + height, left : left + width], target)


def _resize_by_pillow(image: Image.Image, box: list[int], target: View) -> None:
    """Torchvision's resized_crop on a PIL image: crop first, so that nothing beyond the box is seen."""
    top, left, height, width = box
    piece = image.crop((left, top, left + width, top + height))
    target[...] = np.asarray(piece.resize((target.shape[1], target.shape[0]), Image.Resampling.BICUBIC))
