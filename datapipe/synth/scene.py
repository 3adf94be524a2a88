"""One rendered crop: a place, people in front of it, something in the way, and the camera that saw it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from datapipe.core.config import SynthConfig
from datapipe.synth.figure import ACCENT_COLOURS, Appearance, Pixels, draw_appearance, draw_pose, rgb
from datapipe.synth.painting import Canvas, box, ellipse, limb, paint_figure

PERSON, CAMERA, PLACE, IMAGE = range(4)
"""What a random stream is for: the second word of its key, after the seed."""
PLACE_HEIGHT, PLACE_WIDTH = 400, 300


class Shot(NamedTuple):
    """Which image of whom by which camera: counted from 1, from 1 and from 0."""

    identity: int
    camera: int
    image: int


def crop(config: SynthConfig, shot: Shot) -> bytes:
    """The JPEG of one shot: a pure function of the configuration and the shot."""
    rng = np.random.default_rng([config.seed, IMAGE, *shot])
    pixels = _compose(config, person(config.seed, shot.identity), rng)
    pixels = _seen_by(
        camera(config.seed, shot.camera, config.cameras, config.camera_strength), pixels, config.light, rng
    )
    quality = int(rng.integers(config.quality[0], config.quality[1] + 1))
    image = cv2.cvtColor((pixels * 255 + 0.5).astype(np.uint8), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@lru_cache(maxsize=4096)
def person(seed: int, identity: int) -> Appearance:
    """What an identity looks like, under every camera."""
    return draw_appearance(np.random.default_rng([seed, PERSON, identity]))


def _compose(config: SynthConfig, who: Appearance, rng: np.random.Generator) -> Pixels:
    """Place, perhaps somebody behind, the person, perhaps something in front."""
    height, width, canvas = _framed(config, rng)
    canvas.pixels = _cut_out(place(config.seed, int(rng.integers(config.backgrounds))), height, width, rng)
    if rng.random() < config.second_person:
        _bystander(canvas, rng)
    paint_figure(canvas, who, draw_pose(rng))
    if rng.random() < config.occluder:
        _occlude(canvas, rng)
    return canvas.pixels


def _framed(config: SynthConfig, rng: np.random.Generator) -> tuple[int, int, Canvas]:
    """A box that fits the person tightly, up to the jitter of a detector."""
    height = int(rng.integers(config.height[0], config.height[1] + 1))
    width = int(np.clip(height * rng.uniform(0.32, 0.4), *config.width))
    jitter = rng.uniform(-config.box_jitter, config.box_jitter, 3)
    scale = height / (1.03 * (1 + jitter[0]))
    canvas = Canvas(
        pixels=np.zeros((height, width, 3), np.float32),
        scale=scale,
        left=width * (0.5 + jitter[1]),
        top=(height - scale) / 2 + height * jitter[2] * 0.6,
    )
    return height, width, canvas


def _bystander(canvas: Canvas, rng: np.random.Generator) -> None:
    side = rng.choice((-1, 1)) * rng.uniform(0.1, 0.2)
    size = rng.uniform(0.78, 0.95)
    behind = Canvas(
        pixels=canvas.pixels,
        scale=canvas.scale * size,
        left=canvas.left + side * canvas.scale,
        top=canvas.top + canvas.scale * (0.97 - size),
    )
    paint_figure(behind, draw_appearance(rng), draw_pose(rng))


def _occlude(canvas: Canvas, rng: np.random.Generator) -> None:
    """A pole, a bin, a barrier or a bush between the camera and the person."""
    colour = rgb(str(rng.choice(ACCENT_COLOURS)))
    x = float(rng.uniform(-0.16, 0.16))
    kind = rng.integers(4)
    if kind == 0:
        canvas.paint(box(x - 0.028, -0.2, x + 0.028, 1.2), colour)
    elif kind == 1:
        top = float(rng.uniform(0.58, 0.8))
        canvas.paint(box(x - 0.12, top, x + 0.12, 1.2), colour)
        canvas.paint(box(x - 0.135, top - 0.02, x + 0.135, top + 0.02), colour, round_=0.5)
    elif kind == 2:
        for rail in np.arange(rng.uniform(0.5, 0.66), 1.0, 0.11):
            canvas.paint(box(-0.6, float(rail), 0.6, float(rail) + 0.035), colour, round_=0.0)
    else:
        for _ in range(30):
            leaf = rng.normal((x, 0.86), (0.09, 0.09))
            green = (0.12 + 0.1 * rng.random(), 0.25 + 0.2 * rng.random(), 0.1)
            canvas.paint(ellipse(leaf[0], leaf[1], 0.035, 0.025), green)


@dataclass(frozen=True)
class Camera:
    """How a camera changes what is in front of it."""

    gains: Pixels  # [3], white balance times brightness
    gamma: float
    saturation: float
    haze: float
    blur: float  # sigma as a share of the image's height


@lru_cache(maxsize=64)
def camera(seed: int, number: int, cameras: int, strength: float) -> Camera:
    """Properties of camera `number` of so many; with strength 0 only their blur tells them apart.

    Properties are spread evenly over the cameras in an order drawn for each property: with a handful of cameras,
    independent draws made one seed's data set three times as hard as another's (colour histogram
    6 to 18 mAP; now 15 to 23).
    """
    rng = np.random.default_rng([seed, CAMERA])
    spread = np.linspace(-1.1, 1.1, cameras)
    red, green, blue, brightness, gamma, saturation, haze, blur = (
        rng.permutation(spread)[number - 1] for _ in range(8)
    )
    gains = np.exp(strength * (0.16 * np.asarray([red, green, blue]) + 0.2 * brightness))
    return Camera(
        gains=gains.astype(np.float32),
        gamma=float(np.exp(strength * 0.22 * gamma)),
        saturation=float(np.clip(1 + strength * 0.25 * saturation, 0, 2)),
        haze=float(np.clip(strength * 0.1 * abs(haze), 0, 0.6)),
        blur=0.0018 + 0.0009 * float(blur),
    )


def _seen_by(eye: Camera, scene: Pixels, light: float, rng: np.random.Generator) -> Pixels:
    """Optics, light, sensor and colour processing, in that order."""
    height, width = scene.shape[:2]
    image = cv2.GaussianBlur(scene, (0, 0), height * (eye.blur + rng.exponential(0.0012)) + 0.2)
    if rng.random() < 0.15:
        image = cv2.blur(image, (max(1, round(width * rng.uniform(0.02, 0.06))), 1))  # somebody moves
    slope = rng.uniform(-0.08, 0.08)
    ramp = (1 + slope * np.linspace(-1, 1, height, dtype=np.float32))[:, None, None]
    lit = np.asarray(image, np.float32) * (ramp * (eye.gains * np.exp(rng.normal(0, light))).astype(np.float32))
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.004, 0.016))
    grey = (lit @ np.asarray((0.299, 0.587, 0.114), np.float32))[..., None]
    lit = grey * (1 - eye.saturation) + lit * eye.saturation + grain
    bent = np.asarray(cv2.pow(np.clip(lit, 0, 1), eye.gamma), np.float32)
    return np.clip(bent * (1 - eye.haze) + 0.75 * eye.haze, 0, 1).astype(np.float32)


@lru_cache(maxsize=256)
def place(seed: int, number: int) -> Pixels:
    """A greyish wall above a floor, with what stands there; larger than any crop of it."""
    rng = np.random.default_rng([seed, PLACE, number])
    horizon = int(PLACE_HEIGHT * rng.uniform(0.45, 0.8))
    wall, floor = (_greyish(rng, low, high) for low, high in ((0.4, 0.7), (0.35, 0.6)))
    pixels = np.empty((PLACE_HEIGHT, PLACE_WIDTH, 3), np.float32)
    pixels[:horizon], pixels[horizon:] = wall, floor
    (_bricks, _windows, _posts, _foliage, _tiles)[rng.integers(5)](pixels, horizon, rng)
    _floor_lines(pixels, horizon, rng)
    shade = _clouds(rng, 5) * 0.07 + _clouds(rng, 40) * 0.03
    return np.clip(pixels * (1 + shade[..., None]), 0, 1).astype(np.float32)


def _greyish(rng: np.random.Generator, low: float, high: float) -> Pixels:
    tint = np.asarray((1.08, 0.985, 0.9)) * np.exp(rng.normal(0, 0.015, 3))
    return (rng.uniform(low, high) * tint).astype(np.float32)


def _clouds(rng: np.random.Generator, cells: int) -> Pixels:
    field = rng.normal(size=(cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(field, (PLACE_WIDTH, PLACE_HEIGHT), interpolation=cv2.INTER_CUBIC), np.float32)


def _bricks(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    high, wide = int(rng.integers(12, 26)), int(rng.integers(28, 60))
    for row, y in enumerate(range(0, horizon, high)):
        pixels[y : y + 2] *= 0.8
        for x in range((row % 2) * wide // 2, PLACE_WIDTH, wide):
            pixels[y : min(y + high, horizon), x : x + wide] *= np.float32(rng.uniform(0.9, 1.08))
            pixels[y : min(y + high, horizon), x : x + 2] *= 0.85


def _windows(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    glass, frame = _greyish(rng, 0.15, 0.7), _greyish(rng, 0.1, 0.9)
    wide, top = int(rng.integers(50, 110)), int(rng.integers(10, 60))
    for x in range(int(rng.integers(0, 30)), PLACE_WIDTH, wide + 14):
        pixels[top : horizon - 20, x : x + wide] = frame
        pixels[top + 5 : horizon - 25, x + 5 : x + wide - 5] = glass * np.float32(rng.uniform(0.75, 1.25))


def _posts(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(3, 7))):
        x, wide = int(rng.integers(0, PLACE_WIDTH)), int(rng.integers(6, 30))
        pixels[: min(horizon + 30, PLACE_HEIGHT), x : x + wide] = _greyish(rng, 0.15, 0.8)


def _foliage(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    green = np.asarray((0.8, 1.0, 0.7), np.float32) * np.float32(rng.uniform(0.25, 0.5))
    leaves = (1 + 0.3 * _clouds(rng, 60) + 0.2 * _clouds(rng, 14))[..., None]
    top = int(rng.integers(0, max(1, horizon // 2)))
    pixels[top:horizon] = (green * leaves)[top:horizon]


def _tiles(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    side = int(rng.integers(30, 70))
    pixels[0:horizon:side] *= 0.8
    pixels[:horizon, 0::side] *= 0.8


def _floor_lines(pixels: Pixels, horizon: int, rng: np.random.Generator) -> None:
    canvas = Canvas(pixels, 1.0, 0.0, 0.0)
    colour = _greyish(rng, 0.3, 0.9)
    for x in np.arange(-PLACE_WIDTH, 2 * PLACE_WIDTH, rng.uniform(50, 120)):
        line = limb((float(x) * 0.5 + PLACE_WIDTH / 4, horizon), (float(x), PLACE_HEIGHT + 5), 1.0, 4.0)
        canvas.paint(line, (float(colour[0]), float(colour[1]), float(colour[2])), round_=0.0, opacity=0.5)


def _cut_out(scene: Pixels, height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Another part of the place every time, perhaps mirrored, out of focus."""
    high = int(rng.uniform(0.75, 1.0) * PLACE_HEIGHT)
    wide = max(1, high * width // height)
    top, left = int(rng.integers(0, PLACE_HEIGHT - high + 1)), int(rng.integers(0, PLACE_WIDTH - wide + 1))
    part: NDArray[np.float32] = scene[top : top + high, left : left + wide]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    small = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(cv2.GaussianBlur(small, (0, 0), 0.3 + 0.004 * height), dtype=np.float32)
