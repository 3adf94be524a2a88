"""Pairs of regions: what their boxes say is what was cut, flips are shared, overlaps bounded."""

import numpy as np
import pytest
from PIL import Image

from datapipe.core.config import ViewConfig
from datapipe.views import crop_boxes as cuts
from datapipe.views.decode import decode
from datapipe.views.masking import MaskConfig, MaskSpec
from datapipe.views.render import make_views
from datapipe.views.spec import RegionSpec, ViewSpec, regions
from tests.datapipe.crop_set import jpegs

SIZE = (32, 16)
FREE = RegionSpec(scale=(0.3, 0.9), ratio=(0.375, 0.667), iou=(0.0, 1.0), share_flip=True)


def made(crops: list[bytes], spec: ViewSpec, positions: np.ndarray, seed: int = 1) -> tuple[dict, np.ndarray]:
    out = {group.name: np.zeros(spec.shape(group, len(crops)), np.uint8) for group in spec.groups}
    boxes = np.zeros((spec.boxed, len(crops), 5), np.int64)
    assert make_views(crops, spec, seed, positions, out, boxes) == []
    return out, boxes


@pytest.mark.parametrize("share_flip", [True, False])
def test_regions__boxes_say_what_was_cut(share_flip: bool) -> None:
    crops = list(jpegs(30))
    law = RegionSpec(FREE.scale, FREE.ratio, FREE.iou, share_flip)
    spec = regions(ViewConfig(version=2, flip=0.5, interpolation="bicubic"), law, size=SIZE, pair=True)
    out, boxes = made(crops, spec, np.arange(30))
    for view, name in enumerate(("region_a", "region_b")):
        for row, data in enumerate(crops):
            top, left, height, width, flipped = boxes[view, row].tolist()
            piece = Image.fromarray(decode(data)).crop((left, top, left + width, top + height))
            wanted = np.asarray(piece.resize(SIZE[::-1], Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(out[name][0, row], wanted[:, ::-1] if flipped else wanted)
    both = (boxes[0, :, 4] == boxes[1, :, 4]).all()
    assert both == share_flip and 0.2 < boxes[..., 4].mean() < 0.8
    assert (boxes[0, :, :4] != boxes[1, :, :4]).any(axis=1).all()


def test_regions__are_functions_of_seed_and_position() -> None:
    crops, spec = list(jpegs(6)), regions(ViewConfig(), FREE, size=SIZE, pair=True)
    positions = np.array([4, 10**12, 3, 0, 77, 5])
    together, boxes = made(crops, spec, positions)
    for row in range(6):
        alone, box = made(crops[row : row + 1], spec, positions[row : row + 1])
        np.testing.assert_array_equal(box[:, 0], boxes[:, row])
        np.testing.assert_array_equal(alone["region_b"][:, 0], together["region_b"][:, row])
    assert (made(crops, spec, positions, seed=2)[1] != boxes).any(axis=2).all()


@pytest.mark.parametrize("iou", [(0.5, 0.8), (0.0, 0.5)])
def test_regions__overlaps_keep_to_their_bounds(iou: tuple[float, float]) -> None:
    crops = list(jpegs(60))
    bounded = regions(ViewConfig(), RegionSpec((0.3, 0.8), (0.375, 0.667), iou, True), size=SIZE, pair=True)
    free = regions(ViewConfig(), RegionSpec((0.3, 0.8), (0.375, 0.667), (0.0, 1.0), True), size=SIZE, pair=True)
    inside = {}
    for name, spec in (("bounded", bounded), ("free", free)):
        _, boxes = made(crops, spec, np.arange(60))
        overlap = cuts.intersection_over_union(boxes[0, :, :4], boxes[1, :, :4])
        inside[name] = float(((overlap >= iou[0]) & (overlap <= iou[1])).mean())
    assert inside["bounded"] > max(inside["free"] + 0.2, 0.75)


def test_regions__a_bad_row_is_left_alone() -> None:
    crops, spec = list(jpegs(3)), regions(ViewConfig(), FREE, size=SIZE, pair=True)
    _, whole = made(crops, spec, np.arange(3))
    out = {group.name: np.zeros(spec.shape(group, 3), np.uint8) for group in spec.groups}
    boxes = np.full((2, 3, 5), -7, np.int64)
    assert make_views([crops[0], b"", crops[2]], spec, 1, np.arange(3), out, boxes) == [1]
    assert (boxes[:, 1] == -7).all()
    np.testing.assert_array_equal(boxes[:, [0, 2]], whole[:, [0, 2]])


def test_regions__one_alone_and_masks_are_carried() -> None:
    law = MaskSpec((8, 4), MaskConfig(ratios=(0.5,), spreads=(0.0,)), equal=True)
    spec = regions(ViewConfig(interpolation="linear"), FREE, size=SIZE, pair=False, masks=(law,))
    assert [group.name for group in spec.groups] == ["region_a"] and spec.boxed == 1
    assert spec.masks == (law,) and spec.interpolation == "linear"


def test_intersection_over_union__by_hand() -> None:
    one = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [2, 2, 2, 2]])
    other = np.array([[0, 0, 4, 4], [2, 0, 4, 4], [4, 0, 4, 4], [0, 0, 8, 4]])
    np.testing.assert_allclose(cuts.intersection_over_union(one, other), [1, 8 / 24, 0, 4 / 32])


def test_nearest__the_first_within_bounds_else_the_closest() -> None:
    other = np.array([[0, 0, 10, 10]] * 2)
    tried = np.array([
        [[9, 9, 10, 10], [50, 0, 10, 10]],
        [[0, 0, 10, 5], [0, 9, 10, 10]],
        [[0, 0, 10, 6], [0, 8, 10, 10]],
    ])  # fmt: skip
    np.testing.assert_array_equal(cuts.nearest(tried, other, (0.4, 0.9)), [[0, 0, 10, 5], [0, 8, 10, 10]])
