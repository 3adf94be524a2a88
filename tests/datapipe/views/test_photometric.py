"""Each operation against PIL and torchvision with the same argument; how often and how much against torchvision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as functional
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from datapipe.core.config import JitterConfig
from datapipe.core.randomness import draw
from datapipe.views import crop_boxes, photometric
from datapipe.views.photometric import numbers_needed, plan
from datapipe.views.spec import Photometric


def pictures() -> list[np.ndarray]:
    """Views with smooth parts, edges, noise, flat colours and both ends of the scale, as muted as photographs."""
    random = np.random.default_rng(0)
    found = []
    for height, width in ((256, 128), (128, 64), (32, 16)):
        colours = random.integers(0, 256, (8, 5, 3)) / 3 + random.integers(0, 256, (8, 5, 1)) * 2 / 3
        smooth = cv2.resize(colours.astype(np.uint8), (width, height))
        edges = cv2.resize(smooth, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
        edges = cv2.resize(edges, (width, height), interpolation=cv2.INTER_NEAREST)
        noisy = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        stripes = np.where(np.arange(height)[:, None, None] // 4 % 2, smooth, 255 - smooth).astype(np.uint8)
        dark = (smooth // 6).astype(np.uint8)
        found += [smooth, edges, noisy, stripes, dark]
    return [*found, np.zeros((16, 8, 3), np.uint8), np.full((16, 8, 3), 255, np.uint8)]


def differences(ours: Callable[[np.ndarray], None], theirs: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    found = []
    for picture in pictures():
        view = picture.copy()
        ours(view)
        expected = np.asarray(theirs(Image.fromarray(picture)).convert("RGB"))
        found.append(np.abs(view.astype(int) - expected.astype(int)).ravel())
    return np.concatenate(found)


@pytest.mark.parametrize("factor", [0.0, 0.37, 0.6, 1.0, 1.13, 1.4, 2.5])
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_brightness_and_contrast__equal_pil(name: str, factor: float) -> None:
    theirs = partial(getattr(functional, f"adjust_{name}"), **{f"{name}_factor": factor})
    assert differences(partial(getattr(photometric, name), factor=factor), theirs).max() == 0


def test_contrast__rounds_the_mean_as_pil_does() -> None:
    """Means that fall next to a half, where cv2's coarser weights would decide otherwise."""
    random = np.random.default_rng(3)
    for _ in range(300):
        picture = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        view = picture.copy()
        photometric.contrast(view, 0.2)
        np.testing.assert_array_equal(view, np.asarray(functional.adjust_contrast(Image.fromarray(picture), 0.2)))


CLOSE: list[tuple[str, Any, Callable[[Image.Image], Image.Image]]] = [
    *[("saturation", f, partial(functional.adjust_saturation, saturation_factor=f)) for f in (0.0, 0.8, 1.2, 1.9)],
    *[("hue", h, partial(functional.adjust_hue, hue_factor=h)) for h in (-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5)],
    ("grey", None, partial(functional.to_grayscale, num_output_channels=3)),
    *[("blur", s, lambda i, s=s: i.filter(ImageFilter.GaussianBlur(s))) for s in (0.1, 0.3, 0.6, 1.0, 1.5, 2.0)],
]


@pytest.mark.parametrize(("name", "argument", "theirs"), CLOSE)
def test_operation__is_close_to_pil(name: str, argument: Any, theirs: Callable[[Image.Image], Image.Image]) -> None:
    found = differences(lambda view: getattr(photometric, name)(view, argument), theirs)
    assert found.mean() <= 0.6
    assert np.percentile(found, 99) <= 3


def test_solarise__equals_pil() -> None:
    assert differences(photometric.solarise, partial(ImageOps.solarize, threshold=128)).max() == 0


def test_white_balance__scales_channels() -> None:
    view = np.full((4, 2, 3), (100, 200, 10), np.uint8)
    photometric.white_balance(view, np.array([1.1, 1.5, 0.5]))
    assert view[0, 0].tolist() == [110, 255, 5]


def test_erase__fills_the_box_only() -> None:
    view = np.zeros((8, 4, 3), np.uint8)
    photometric.erase(view, (2, 1, 3, 2))
    assert (view[2:5, 1:3] == photometric.ERASE_FILL).all()
    assert (view.any(axis=2).sum()) == 6


def test_operations__work_in_place_on_slices_of_a_batch() -> None:
    batch = np.stack([pictures()[0]] * 3)
    before = batch.copy()
    steps = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.1, "blur": 1.0}
    for operation, argument in steps.items():
        getattr(photometric, operation)(batch[1], argument)
        alone = before[1].copy()
        getattr(photometric, operation)(alone, argument)
        np.testing.assert_array_equal(batch[1], alone)
        np.testing.assert_array_equal(batch[[0, 2]], before[[0, 2]])
        before[1] = alone


ALL = Photometric(jitter=JitterConfig(probability=0.8, white_balance=0.1), grey=0.2, blur=0.5, solarise=0.3, erase=0.4)


def planned(setting: Photometric, count: int = 6000, size: tuple[int, int] = (64, 32)) -> list[list[tuple[str, Any]]]:
    unit = draw(5, {name: number for name, number in numbers_needed(setting).items()}, np.arange(count))
    return [[(step.__name__, argument) for step, argument in steps] for steps in plan(setting, unit, size, count)]


def test_plan__probabilities_are_the_settings() -> None:
    steps = planned(ALL)
    expected = {
        "white_balance": 0.8,
        "brightness": 0.8,
        "hue": 0.8,
        "grey": 0.2,
        "blur": 0.5,
        "solarise": 0.3,
        "erase": 0.4,
    }
    for name, probability in expected.items():
        hits = sum(name in dict(todo) for todo in steps)
        assert stats.binomtest(hits, len(steps), probability).pvalue > 0.001, name


def test_plan__jitter_follows_torchvisions_own_sampling() -> None:
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(4000)]
    ours = [todo for todo in planned(Photometric(jitter=JitterConfig(probability=1.0)), 4000)]
    names = ("brightness", "contrast", "saturation", "hue")
    for at, name in enumerate(names):
        pair = [dict(todo)[name] for todo in ours], [found[1 + at] for found in theirs]
        assert stats.ks_2samp(*pair).pvalue > 0.001, name
    orders = [[names.index(step) for step, _ in todo] for todo in ours]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


def test_plan__limits_above_one_are_clipped_and_zero_means_never() -> None:
    setting = Photometric(jitter=JitterConfig(probability=1.0, brightness=1.5, contrast=0, saturation=0, hue=0))
    steps = planned(setting, 500)
    assert {tuple(name for name, _ in todo) for todo in steps} == {("brightness",)}
    factors = [todo[0][1] for todo in steps]
    assert 0 <= min(factors) < 0.1 and 2.4 < max(factors) < 2.5


def test_plan__blur_and_white_balance_follow_their_laws() -> None:
    steps = planned(ALL)
    sigmas = [dict(todo)["blur"] for todo in steps if "blur" in dict(todo)]
    assert stats.kstest(sigmas, "uniform", (0.1, 1.9)).pvalue > 0.001
    gains = np.concatenate([dict(todo)["white_balance"] for todo in steps if "white_balance" in dict(todo)])
    assert stats.kstest(np.log(gains) / 0.1, "norm").pvalue > 0.001


def test_plan__erasing_follows_torchvisions_own_sampling() -> None:
    torch.manual_seed(0)
    blank = torch.zeros(3, 64, 32)
    law = blank, (0.02, 0.3), (0.3, 3.3), [0.0]
    theirs = np.array([transforms.RandomErasing.get_params(*law)[:4] for _ in range(3000)])
    unit = draw(9, {"erase": crop_boxes.NUMBERS}, np.arange(3000))["erase"]
    ours = crop_boxes.erasures(unit, (64, 32), (0.02, 0.3), photometric.ERASE_RATIO)
    for at, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, at], theirs[:, at]).pvalue > 0.001, name


def test_plan__does_nothing_where_nothing_is_asked() -> None:
    assert numbers_needed(Photometric()) == {}
    assert plan(Photometric(), {}, (8, 4), 3) == [[], [], []]
