"""Views against PIL and torchvision with the same boxes; boxes against torchvision's own sampling; purity."""

import pickle
from dataclasses import replace
from io import BytesIO
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as functional
import torchvision.transforms.v2.functional as functional_v2
from PIL import Image
from scipy import stats

from datapipe.core.config import JitterConfig, ViewConfig
from datapipe.core.randomness import draw
from datapipe.views import crop_boxes
from datapipe.views.decode import decode
from datapipe.views.render import make_views
from datapipe.views.spec import Photometric, ViewGroup, ViewSpec, multi_crop, padded
from tests.datapipe.crop_set import jpegs
from training.config.bicubic import resize as resize_by_torch

BANDS = ((0.0, 0.5),) * 3 + ((0.25, 0.75),) * 3 + ((0.5, 1.0),) * 3
PLAIN = ViewConfig(jitter=JitterConfig(probability=0), grey=0, blur=(0, 0, 0), solarise=(0, 0, 0))


def geometry(
    interpolation: str,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: float = 0.5,
    bands: tuple[tuple[float, float], ...] = ((0.0, 1.0),),
    size: tuple[int, int] = (64, 32),
) -> ViewSpec:
    group = ViewGroup("plain", size, scale, (0.375, 0.667), flip, bands, (Photometric(),) * len(bands))
    return ViewSpec((group,), interpolation)  # type: ignore[arg-type]


def make(crops: list[bytes], spec: ViewSpec, seed: int, positions: np.ndarray) -> dict[str, np.ndarray]:
    out = {group.name: np.full(spec.shape(group, len(crops)), 7, np.uint8) for group in spec.groups}
    assert make_views(crops, spec, seed, positions, out) == []
    return out


def chosen(crops: list[bytes], spec: ViewSpec, seed: int, positions: np.ndarray, view: int) -> list[tuple]:
    """Box and flip of each image, once more from the law itself."""
    group, found = spec.groups[0], []
    for data, position in zip(crops, positions, strict=True):
        height, width = decode(data).shape[:2]
        top, rows = (int(height * share) for share in (group.bands[view][0], np.diff(group.bands[view])[0]))
        wanted = {f"views/plain/{view}/crop": crop_boxes.NUMBERS, f"views/plain/{view}/flip": 1}
        crop, flip = (unit for unit in draw(seed, wanted, np.array([position])).values())
        box = crop_boxes.crops(crop, np.array([rows]), np.array([width]), group.scale, group.ratio)[0]
        found.append((int(box[0]) + top, *map(int, box[1:]), bool(flip[0, 0] < group.flip)))
    return found


@pytest.mark.parametrize("bands", [((0.0, 1.0),), ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))])
@pytest.mark.parametrize("version", [2, 3])
def test_make_views__bicubic_equals_torchvisions_resized_crop(
    bands: tuple[tuple[float, float], ...], version: Literal[2, 3]
) -> None:
    """Of a PIL image by version 2, of a tensor by version 3."""
    crops, positions = list(jpegs(12)), np.arange(12) + 10**9
    spec = replace(geometry("bicubic", bands=bands), version=version)
    views = make(crops, spec, 3, positions)["plain"]
    for view in range(len(bands)):
        for row, (*box, flip) in enumerate(chosen(crops, spec, 3, positions, view)):
            image = Image.fromarray(decode(crops[row]))
            given = image if version == 2 else functional.pil_to_tensor(image).contiguous()
            cut = functional_v2.resized_crop(given, *box, [64, 32], transforms.InterpolationMode.BICUBIC)
            expected = np.asarray(cut) if version == 2 else cut.permute(1, 2, 0).numpy()
            expected = expected[:, ::-1] if flip else expected
            np.testing.assert_array_equal(views[view, row], expected)


def test_make_views__another_way_of_resizing_gives_the_same_bytes() -> None:
    crops, spec, positions = list(jpegs(12)), geometry("bicubic"), np.arange(12)
    out = {"plain": np.zeros_like(make(crops, spec, 3, positions)["plain"])}
    make_views(crops, spec, 3, positions, out, resize=resize_by_torch)
    np.testing.assert_array_equal(out["plain"], make(crops, spec, 3, positions)["plain"])


HEIGHTS = np.arange(20, 601)


@pytest.fixture(scope="module")
def every_height() -> list[bytes]:
    """An image of each height of HEIGHTS, 9 pixels wide."""
    files = []
    for height in HEIGHTS.tolist():
        buffer = BytesIO()
        Image.new("RGB", (9, height), (height % 251, 90, 30)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("version", [1, 2])
def test_make_views__bands_of_all_heights_are_the_rows_of_the_reference(
    every_height: list[bytes], version: Literal[1, 2]
) -> None:
    """PASS `main_pass.py`, DataAugmentationDINO: every area has int(.5 H) rows, from row 0, int(.25 H) or int(.5 H) on.
    Version 1 is what runs of earlier versions of this project go on with. Crops that never fit fall back to the whole
    of their area, and their boxes tell where it lies."""
    bands = ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))
    area = ViewGroup("area", (8, 4), (2.0, 2.0), (1e-3, 1e3), 0.0, bands, (Photometric(),) * 3, boxed=True)
    spec = ViewSpec((area,), "linear", version=version)
    boxes = np.zeros((3, len(HEIGHTS), 5), np.int64)
    out = {"area": np.zeros(spec.shape(area, len(HEIGHTS)), np.uint8)}
    assert make_views(every_height, spec, 0, np.arange(len(HEIGHTS)), out, boxes) == []
    tops = np.stack([0 * HEIGHTS, HEIGHTS // 4, HEIGHTS // 2])
    rows = np.stack([HEIGHTS // 2] * 3)
    if version == 1:
        rows[1] += HEIGHTS % 4 == 3
        rows[2] += HEIGHTS % 2
    np.testing.assert_array_equal(boxes[:, :, 0], tops)
    np.testing.assert_array_equal(boxes[:, :, 2], rows)
    assert (boxes[:, :, 1] == 0).all() and (boxes[:, :, 3] == 9).all()


@pytest.mark.parametrize("size", [(24, 12), (64, 32), (256, 128)])
def test_make_views__linear_is_close_to_bicubic(size: tuple[int, int]) -> None:
    crops, positions = list(jpegs(30)), np.arange(30)
    fast, slow = (make(crops, geometry(kind, size=size), 3, positions)["plain"] for kind in ("linear", "bicubic"))
    found = np.abs(fast.astype(int) - slow.astype(int))
    assert found.mean() <= 1.6
    assert np.percentile(found, 99) <= 12


def test_make_views__decodes_as_pil_does() -> None:
    for data in jpegs(10):
        found = np.abs(decode(data).astype(int) - np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int))
        assert found.mean() <= 0.6 and np.percentile(found, 99) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 64), (260, 100), (90, 30), (40, 120), (64, 64)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.4, 1.0), (3 / 4, 4 / 3)), ((0.05, 0.4), (0.375, 0.667))])
def test_crops__follow_torchvisions_own_sampling(
    shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    torch.manual_seed(1)
    blank, count = torch.zeros(1, *shape), 3000
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)])
    unit = draw(2, {"crop": crop_boxes.NUMBERS}, np.arange(count))["crop"]
    ours = crop_boxes.crops(unit, np.full(count, shape[0]), np.full(count, shape[1]), scale, ratio)
    for at, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, at], theirs[:, at], method="asymp").pvalue > 0.001, name
    assert (ours[:, :2] + ours[:, 2:] <= np.array(shape)).all() and (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()


def test_crops__fall_back_to_the_centre_as_often_as_measured() -> None:
    """A 3:1 crop with the default ratio gives up in 93 % of all cases (PASS's and DINO's setting)."""
    unit = draw(2, {"crop": crop_boxes.NUMBERS}, np.arange(20_000))["crop"]
    height, width = np.full(20_000, 300), np.full(20_000, 100)
    found = crop_boxes.crops(unit, height, width, (0.4, 1.0), (3 / 4, 4 / 3))
    centre = (found == np.array([83, 0, 133, 100])).all(axis=1).mean()
    assert 0.91 < centre < 0.95


def test_make_views__views_are_functions_of_seed_and_position() -> None:
    config = ViewConfig(erase=(0.5, 0.5, 0.5), jitter=JitterConfig(white_balance=0.1), interpolation="linear")
    spec = multi_crop(config, size=(32, 16), local_size=(16, 8), local_bands=BANDS)
    crops, positions = list(jpegs(7)), np.array([4, 10**12, 3, 0, 77, 5, 6])
    together = make(crops, spec, 1, positions)
    for row in range(7):
        alone = make(crops[row : row + 1], spec, 1, positions[row : row + 1])
        for name in together:
            np.testing.assert_array_equal(together[name][:, row], alone[name][:, 0])
    for other in (make(crops, spec, 2, positions), make(crops, spec, 1, positions + 1)):
        assert all((together[name] != other[name]).any(axis=(2, 3, 4)).all() for name in together)


def test_make_views__bad_rows_are_named_and_left_alone() -> None:
    crops, spec = list(jpegs(4)), geometry("linear")
    whole = make(crops, spec, 1, np.arange(4))["plain"]
    cut = [crops[0], b"", crops[2], crops[3][: len(crops[3]) // 2]]
    out = {"plain": np.full((1, 4, 64, 32, 3), 7, np.uint8)}
    assert make_views(cut, spec, 1, np.arange(4), out) == [1, 3]
    np.testing.assert_array_equal(out["plain"][:, [0, 2]], whole[:, [0, 2]])
    assert (out["plain"][:, [1, 3]] == 7).all()
    assert make_views([b"x"], spec, 1, np.arange(1), {"plain": out["plain"][:, :1]}) == [0]


def test_decode__reads_grey_cmyk_and_png() -> None:
    picture = Image.fromarray(decode(next(jpegs(1))))
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG")):
        buffer = BytesIO()
        picture.convert(mode).save(buffer, kind)
        found = decode(buffer.getvalue())
        assert found.shape == (picture.height, picture.width, 3) and found.dtype == np.uint8


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (500, 3)])
def test_make_views__odd_sizes_work(shape: tuple[int, int]) -> None:
    buffer = BytesIO()
    Image.new("RGB", shape[::-1], (200, 10, 60)).save(buffer, "JPEG")
    for interpolation in ("linear", "bicubic"):
        spec = geometry(interpolation, bands=((0.0, 0.5), (0.5, 1.0), (0.99, 1.0)))
        views = make([buffer.getvalue()], spec, 1, np.arange(1))["plain"]
        assert np.abs(views.astype(int) - (200, 10, 60)).max() < 8


def test_multi_crop__has_two_globals_and_a_local_view_per_band() -> None:
    spec = multi_crop(ViewConfig(), size=(256, 128), local_size=(128, 64), local_bands=BANDS)
    pair, small = spec.groups
    assert (pair.name, pair.size, pair.bands) == ("global", (256, 128), ((0.0, 1.0),) * 2)
    assert (small.name, small.size, small.bands) == ("local", (128, 64), BANDS)
    assert [colours.blur for colours in pair.photometric] == [1.0, 0.1]
    assert [colours.solarise for colours in pair.photometric] == [0.0, 0.2]
    assert {colours.blur for colours in small.photometric} == {0.5}
    assert spec.shape(small, 5) == (9, 5, 128, 64, 3)
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert len(multi_crop(ViewConfig(), size=(8, 4), local_size=(4, 2), local_bands=()).groups) == 1


def test_multi_crop__bands_hold_their_crops() -> None:
    """A picture of three colours from top to bottom: each band sees its own part only."""
    rows = np.repeat(np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]], np.uint8), 50, axis=0)
    buffer = BytesIO()
    Image.fromarray(np.repeat(rows[:, None], 80, axis=1)).save(buffer, "PNG")
    spec = multi_crop(PLAIN, size=(32, 16), local_size=(16, 8), local_bands=BANDS)
    views = make([buffer.getvalue()] * 20, spec, 1, np.arange(20))["local"].astype(int)
    red, green, blue = (views[..., channel] > 200 for channel in range(3))
    white = red & green & blue
    assert not (blue[:3].any() or (green[6:] & ~white[6:]).any() or (red[3:6].any()))


def test_view_group__refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="2 bands but 1"):
        ViewGroup("a", (2, 1), (0, 1), (1, 1), 0.5, ((0, 1), (0, 1)), (Photometric(),))


@pytest.mark.parametrize("pad", [0, 5])
def test_padded__equals_torchvisions_resize_flip_pad_and_crop(pad: int) -> None:
    crops, positions, size = list(jpegs(24)), np.arange(24), (64, 32)
    spec = padded(replace(PLAIN, version=2, interpolation="bicubic"), size=size, pad=pad)
    views = make(crops, spec, 3, positions)["image"][0]
    moves = set()
    for data, view in zip(crops, views, strict=True):
        image = functional.resize(Image.fromarray(decode(data)), list(size), transforms.InterpolationMode.BICUBIC)
        places = list(product((False, True), range(2 * pad + 1), range(2 * pad + 1)))
        around = {flip: functional.pad(functional.hflip(image) if flip else image, pad) for flip in (False, True)}
        found = [place for place in places
                 if np.array_equal(view, np.asarray(functional.crop(around[place[0]], *place[1:], *size)))]  # fmt: skip
        assert len(found) == 1, "no place, or several"
        moves.add(found[0])
    assert len({flip for flip, *_ in moves}) == 2
    assert len(moves) > 15 if pad else len(moves) == 2
