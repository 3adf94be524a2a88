"""What a rendered pedestrian looks like and how it stands: pure functions of a random stream.

Figure coordinates: y runs from 0 (crown) to 1 (soles), x is in the same unit with 0 on the body's axis. Colours are RGB
in 0..1 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Colour = tuple[float, float, float]
Fabric = Callable[[Pixels, Pixels], Pixels]
"""Figure coordinates x [1,w], y [h,1] -> colours that broadcast to [h,w,3]."""
View = Literal["front", "back", "left", "right"]
VIEWS: tuple[View, ...] = ("front", "back", "left", "right")

UPPER_COLOURS = ("1c1c20", "e6e4de", "85878b", "b0272d", "22305f", "2f6b43", "b79a6b", "d9b432", "8a4a86", "79a9cf")
LOWER_COLOURS = ("1d1e22", "3a5680", "6c6e72", "988665", "cfcac0", "4a362c")
ACCENT_COLOURS = ("16161a", "7a2a24", "8a6a3c", "2a4a72", "cfc9b8", "47563a", "c2622c", "5d5f66")
SKIN_COLOURS = ("f0cfb4", "e0b08c", "c08a62", "8f5f40", "5a3a28")
HAIR_COLOURS = ("17130f", "3a2518", "6b4526", "b58a4e", "9a9894", "6e2f1c")
PATTERNS = ("stripes", "pinstripes", "checks", "dots", "band", "camouflage", "blocks")
HAIR_STYLES = ("short", "long", "bald", "bun", "cap")
BAGS = ("backpack", "shoulder", "hand")
LETTERS = "AEHKMNRSTXZ0258"


def rgb(text: str) -> Colour:
    """The colour of six hexadecimal digits."""
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return red, green, blue


@dataclass(frozen=True)
class Garment:
    """A piece of cloth: the pattern is fixed to the body, so that every camera sees the same one."""

    colour: Colour
    second: Colour
    pattern: str  # one of PATTERNS, or "plain"
    period: float  # figure units
    phase: float  # 0..1
    patches: Pixels  # [10, 10], what camouflage is made of

    def __call__(self, x: Pixels, y: Pixels) -> Pixels:
        share = self._share(x / self.period, y / self.period + self.phase, x, y)[..., None]
        return np.asarray(self.colour, np.float32) * (1 - share) + np.asarray(self.second, np.float32) * share

    def _share(self, u: Pixels, v: Pixels, x: Pixels, y: Pixels) -> Pixels:
        """How much of the second colour there is, 0..1, with edges soft enough not to alias."""
        if self.pattern == "stripes":
            return _soft(_wave(v) - 0.1) + 0 * x
        if self.pattern == "pinstripes":
            return _soft(_wave(u) - 0.35) + 0 * y
        if self.pattern == "checks":
            return 0.5 * _soft(_wave(u)) + 0.5 * _soft(_wave(v))
        if self.pattern == "dots":
            return _soft(2.2 * (_wave(u * 0.8) * _wave(v * 0.8)) - 0.9)
        if self.pattern == "band":
            return _soft(8 * (0.6 * self.period + 0.02 - np.abs(y - 0.24 - 0.1 * self.phase)) / self.period) + 0 * x
        if self.pattern == "camouflage":
            return self._camouflage(x, y)
        if self.pattern == "blocks":
            return _soft(30 * (y - 0.27 - 0.1 * self.phase)) + 0 * x
        return 0 * x * y

    def _camouflage(self, x: Pixels, y: Pixels) -> Pixels:
        columns = np.broadcast_to((x + 0.2) * 22, (y.shape[0], x.shape[1])).astype(np.float32)
        rows = np.broadcast_to(y * 12, columns.shape).astype(np.float32)
        field = cv2.remap(self.patches, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        return _soft(5 * np.asarray(field, np.float32))


def _wave(turns: Pixels) -> Pixels:
    return np.sin(2 * np.pi * turns)


def _soft(value: Pixels) -> Pixels:
    return np.clip(0.5 + 2 * value, 0, 1)


@dataclass(frozen=True)
class Appearance:
    """Everything that stays the same about a person from image to image."""

    upper: Garment
    lower: Garment
    inner: Colour | None  # what an open jacket shows in front
    sleeves: Colour | None  # sleeves of another colour
    short_sleeves: bool
    legs: str  # trousers | shorts | skirt
    coat: float  # how far the upper garment falls below the waist
    skin: Colour
    hair: Colour
    hair_style: str
    hat: Colour
    shoes: Colour
    build: float  # width of the body, 1 is average
    head: float  # size of the head, likewise
    bag: str  # one of BAGS, or ""
    bag_colour: Colour
    bag_side: int  # +1: the person's left
    logo: str  # "" or what stands on the chest
    logo_colour: Colour
    back_print: bool


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """A person at random: few clothes colours, so that many share them; patterns, bags and build tell them apart."""
    upper = _draw_garment(rng, UPPER_COLOURS, patterned=0.7)
    return Appearance(
        upper=upper,
        lower=_draw_garment(rng, LOWER_COLOURS, patterned=0.12),
        inner=_pick(rng, UPPER_COLOURS) if rng.random() < 0.22 else None,
        sleeves=upper.second if rng.random() < 0.15 else None,
        short_sleeves=bool(rng.random() < 0.35),
        legs=str(rng.choice(("trousers", "shorts", "skirt"), p=(0.66, 0.19, 0.15))),
        coat=float(rng.choice((0.0, 0.03, 0.14), p=(0.45, 0.35, 0.2))),
        skin=_pick(rng, SKIN_COLOURS),
        hair=_pick(rng, HAIR_COLOURS),
        hair_style=str(rng.choice(HAIR_STYLES, p=(0.4, 0.26, 0.08, 0.1, 0.16))),
        hat=_pick(rng, ACCENT_COLOURS),
        shoes=_pick(rng, ACCENT_COLOURS),
        build=float(rng.uniform(0.82, 1.25)),
        head=float(rng.uniform(0.92, 1.1)),
        bag=str(rng.choice(BAGS)) if rng.random() < 0.55 else "",
        bag_colour=_pick(rng, ACCENT_COLOURS),
        bag_side=int(rng.choice((-1, 1))),
        logo="".join(rng.choice(list(LETTERS), size=rng.integers(1, 3))) if rng.random() < 0.4 else "",
        logo_colour=_pick(rng, UPPER_COLOURS),
        back_print=bool(rng.random() < 0.4),
    )


def _draw_garment(rng: np.random.Generator, colours: tuple[str, ...], *, patterned: float) -> Garment:
    first, second = rng.choice(len(colours), size=2, replace=False)
    return Garment(
        colour=_jittered(rng, colours[first]),
        second=_jittered(rng, colours[second]),
        pattern=str(rng.choice(PATTERNS)) if rng.random() < patterned else "plain",
        period=float(rng.uniform(0.035, 0.085)),
        phase=float(rng.random()),
        patches=rng.normal(size=(10, 10)).astype(np.float32),
    )


def _pick(rng: np.random.Generator, colours: tuple[str, ...]) -> Colour:
    return _jittered(rng, str(rng.choice(colours)))


def _jittered(rng: np.random.Generator, text: str) -> Colour:
    red, green, blue = np.clip(np.asarray(rgb(text)) + rng.uniform(-10, 10, 3) / 255, 0, 1)
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class Pose:
    """What changes from image to image."""

    view: View
    stride: float  # figure units, half the distance between the feet
    phase: float  # radians of the walk
    lean: float  # figure units at the head
    light: float  # -1..1: the side the light comes from
    folds: Pixels  # [12, 5], shading of the cloth

    @property
    def sideways(self) -> bool:
        return self.view in ("left", "right")

    def side(self, person_side: int) -> int:
        """Where (+1: right in the image) the person's left (+1) or right (-1) is when seen from front or back."""
        return -person_side if self.view == "back" else person_side


def draw_pose(rng: np.random.Generator) -> Pose:
    """A view and a moment of the walk at random."""
    return Pose(
        view=VIEWS[rng.integers(len(VIEWS))],
        stride=float(rng.uniform(0.02, 0.1)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        lean=float(rng.normal(0, 0.008)),
        light=float(rng.uniform(-1, 1)),
        folds=rng.normal(size=(12, 5)).astype(np.float32),
    )
