"""The usual ways to do it, as the published codes do: PIL and torchvision, one image at a time."""

import random
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torchvision.transforms as transforms
from PIL import Image, ImageFilter, ImageOps

from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.bench.specs import BANDS, GLOBAL, GLOBAL_SCALE, LOCAL, LOCAL_SCALE

Transform = Callable[[Any], Any]
BICUBIC = transforms.InterpolationMode.BICUBIC


class PassRecipe:
    """PASS's augmentation (PASS/main_pass.py:535-589): bytes -> 2 global and 9 local views.

    `colours`: jitter, grey, blur and solarising too; `tensors`: ToTensor and Normalize too, otherwise PIL images.
    """

    def __init__(self, *, colours: bool, tensors: bool) -> None:
        end = [normalised()] if tensors else []
        blurs = ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0))
        middle = [_colours(blur, solarise) if colours else [] for blur, solarise in blurs]
        whole = [_cut(GLOBAL, GLOBAL_SCALE), transforms.RandomHorizontalFlip(0.5)]
        piece = [_cut(LOCAL, LOCAL_SCALE), transforms.RandomHorizontalFlip(0.5)]
        self.globals = [transforms.Compose([*whole, *steps, *end]) for steps in middle[:2]]
        self.local = transforms.Compose([*piece, *middle[2], *end])

    def __call__(self, data: bytes) -> list[Any]:
        image = opened(data)
        views = [transform(image) for transform in self.globals]
        for top, bottom in BANDS:
            first, rows = int(top * image.height), int((bottom - top) * image.height)
            band = image.crop((0, first, image.width, first + rows))
            views.append(self.local(band))
        return views


def opened(data: bytes) -> Image.Image:
    """Decoded, RGB."""
    return Image.open(BytesIO(data)).convert("RGB")


def normalised() -> Transform:
    """PIL image -> float tensor, normalised by ImageNet's statistics."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _cut(size: tuple[int, int], scale: tuple[float, float]) -> Transform:
    return transforms.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC)


def _colours(blur: float, solarise: float) -> list[Transform]:
    return [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        _Sometimes(blur, _blurred),
        _Sometimes(solarise, ImageOps.solarize),
    ]


class _Sometimes:
    """A step with a probability, by Python's own generator as in the reference."""

    def __init__(self, probability: float, step: Transform) -> None:
        self.probability, self.step = probability, step

    def __call__(self, image: Any) -> Any:
        return self.step(image) if random.random() < self.probability else image


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
