"""Contact sheets show the crops and the very views that training gets."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datapipe.core.config import StreamConfig, ViewConfig
from datapipe.core.errors import ConfigError, NotFoundError
from datapipe.sampling.epoch_order import Order
from datapipe.stream.preview import OUTLINES, TrainingViews, contact_sheet, view_sheet
from datapipe.views.masking import MaskConfig, MaskSpec, draw_masks
from datapipe.views.render import make_views
from datapipe.views.spec import RegionSpec, multi_crop, regions
from tests.conftest import S3Server
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

SPEC = multi_crop(ViewConfig(), size=(64, 32), local_size=(32, 16), local_bands=((0.0, 1.0),) * 2)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> CropSet:
    return crop_set.write(tmp_path_factory.mktemp("crops") / "set", 23, no_images=(4,))


def test_contact_sheet__shows_the_views_of_training(crops: CropSet, tmp_path: Path) -> None:
    stream = StreamConfig(block=5, window=2)
    path = contact_sheet(str(crops.folder), tmp_path / "new" / "sheet.png", spec=SPEC, seed=3, count=6, stream=stream)
    sheet = np.asarray(Image.open(path))
    rows = Order(23, 3, 5, 2).samples(np.arange(6))
    views = {group.name: np.zeros(SPEC.shape(group, 6), np.uint8) for group in SPEC.groups}
    make_views([crops.jpegs[row] for row in rows], SPEC, 3, np.arange(6), views)
    for view in (views["global"][0, 0], views["global"][1, 5], views["local"][1, 3]):
        assert contains(sheet, view)


def test_contact_sheet__shows_hidden_patches_in_grey(crops: CropSet, tmp_path: Path) -> None:
    law = MaskSpec((8, 4), MaskConfig(ratios=(0.5,), spreads=(0.0,)), equal=True)
    spec = replace(SPEC, masks=(law, law))
    path = contact_sheet(str(crops.folder), tmp_path / "sheet.png", spec=spec, seed=3, count=2,
                         stream=StreamConfig(block=5, window=2))  # fmt: skip
    rows = Order(23, 3, 5, 2).samples(np.arange(2))
    views = {group.name: np.zeros(spec.shape(group, 2), np.uint8) for group in spec.groups}
    make_views([crops.jpegs[row] for row in rows], spec, 3, np.arange(2), views)
    masks = draw_masks(spec.masks, 3, np.arange(2))
    for view in range(2):
        shown = views["global"][view, 1]
        for row, column in np.argwhere(masks[view, 1]):
            shown[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 127
        assert contains(np.asarray(Image.open(path)), shown)


def test_contact_sheet__outlines_the_regions_on_the_crop_and_masks_the_first(crops: CropSet, tmp_path: Path) -> None:
    law = RegionSpec(scale=(0.3, 0.5), ratio=(0.375, 0.667), iou=(0.0, 1.0), share_flip=False)
    mask = MaskSpec((8, 4), MaskConfig(ratios=(0.5,), spreads=(0.0,)), equal=True)
    spec = regions(ViewConfig(), law, size=(64, 32), pair=True, masks=(mask,))
    path = contact_sheet(str(crops.folder), tmp_path / "sheet.png", spec=spec, seed=3, count=1,
                         stream=StreamConfig(block=5, window=2))  # fmt: skip
    jpeg = crops.jpegs[int(Order(23, 3, 5, 2).samples(np.arange(1))[0])]
    views = {group.name: np.zeros(spec.shape(group, 1), np.uint8) for group in spec.groups}
    boxes = np.zeros((2, 1, 5), np.int64)
    make_views([jpeg], spec, 3, np.arange(1), views, boxes)
    sheet = np.asarray(Image.open(path)).astype(int)
    height, width = np.asarray(Image.open(BytesIO(jpeg))).shape[:2]
    scale = min(192 / height, 96 / width)
    for box, colour in zip(boxes[:, 0, :4], OUTLINES, strict=False):
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        found = (rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min())
        assert np.allclose(found, box[2:] * scale, atol=2)
    first, second = ((sheet == colour).all(axis=2).nonzero() for colour in OUTLINES[:2])
    apart = [first[axis].min() - second[axis].min() for axis in (0, 1)]
    assert np.allclose(apart, (boxes[0, 0, :2] - boxes[1, 0, :2]) * scale, atol=2)
    assert contains(sheet, views["region_b"][0, 0]) and not contains(sheet, views["region_a"][0, 0])


def test_contact_sheet__shows_the_bands_of_the_body_on_the_crop(crops: CropSet, tmp_path: Path) -> None:
    """Three that overlap, as PASS cuts its local views from: a bar beside the crop each, from its top to its bottom."""
    bands = ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))
    spec = multi_crop(ViewConfig(), size=(64, 32), local_size=(32, 16), local_bands=bands)
    path = contact_sheet(str(crops.folder), tmp_path / "sheet.png", spec=spec, seed=3, count=1)
    sheet = np.asarray(Image.open(path)).astype(int)
    bars = [(sheet == colour).all(axis=2) for colour in OUTLINES]
    columns = [int(bar.sum(axis=0).argmax()) for bar in bars]
    assert columns[0] < columns[1] < columns[2]
    lines = [bar[:, at] for bar, at in zip(bars, columns, strict=True)]
    tops, lengths = [int(line.argmax()) for line in lines], [int(line.sum()) for line in lines]
    assert max(lengths) - min(lengths) <= 2
    assert [round((top - tops[0]) / lengths[0], 1) for top in tops] == [0.0, 0.5, 1.0]


def test_training_views__without_a_version_are_of_the_first_rule() -> None:
    """As versions of this project wrote them that had no other rule."""
    views = TrainingViews(SPEC, 3, 5, 2)
    assert TrainingViews.from_json(views.to_json(), where="views.json") == views and views.spec.version == 3
    tree = json.loads(views.to_json())
    del tree["spec"]["version"]
    earlier = TrainingViews.from_json(json.dumps(tree), where="views.json")
    assert earlier == replace(views, spec=replace(SPEC, version=1))


def contains(sheet: np.ndarray, picture: np.ndarray) -> bool:
    height, width = picture.shape[:2]
    corners = np.argwhere((sheet[: 1 - height or None, : 1 - width or None] == picture[0, 0]).all(axis=2))
    return any((sheet[top : top + height, left : left + width] == picture).all() for top, left in corners)


@pytest.mark.parametrize("count", [1, 12, 100])
def test_contact_sheet__shows_crops_alone_even_broken_ones(crops: CropSet, tmp_path: Path, count: int) -> None:
    path = contact_sheet(str(crops.folder), tmp_path / "sheet.jpg", count=count)
    assert Image.open(path).format == "JPEG"


def test_contact_sheet__says_what_is_wrong(crops: CropSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jpg or \.png"):
        contact_sheet(str(crops.folder), tmp_path / "sheet.gif")
    with pytest.raises(NotFoundError):
        contact_sheet(str(tmp_path / "nowhere"), tmp_path / "sheet.jpg")


def test_view_sheet__is_a_jpeg_with_a_row_per_image(tmp_path: Path) -> None:
    views = {"global": np.full((2, 20, 64, 32, 3), 90, np.uint8), "local": np.full((6, 20, 32, 16, 3), 200, np.uint8)}
    data = view_sheet(views, tmp_path / "first_batch.jpg", count=3)
    assert (tmp_path / "first_batch.jpg").read_bytes() == data == view_sheet(views, count=3)
    assert Image.open(BytesIO(data)).height < Image.open(BytesIO(view_sheet(views, count=5))).height


def test_view_sheet__names_of_the_images_stand_above_their_first_view() -> None:
    views = {"global": np.full((2, 3, 64, 32, 3), 90, np.uint8)}
    plain, named = (np.asarray(Image.open(BytesIO(view_sheet(views, names=names)))) for names in ((), ("7", "8", "9")))
    assert named.shape[0] == plain.shape[0] + 3 * 12 and named.shape[1] == plain.shape[1]


def test_contact_sheet__is_written_to_an_object_store(crops: CropSet, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.bucket()
    url = contact_sheet(str(crops.folder), f"s3://{bucket}/sheets/a.png", count=3, storage=s3.storage)
    assert url == f"s3://{bucket}/sheets/a.png"
    local = contact_sheet(str(crops.folder), tmp_path / "a.png", count=3)
    assert s3.objects(bucket) == {"sheets/a.png": Path(local).read_bytes()}
