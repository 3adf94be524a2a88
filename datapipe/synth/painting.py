"""How a rendered pedestrian is painted: outlines in figure coordinates, filled back to front."""

from dataclasses import dataclass

import cv2
import numpy as np

from datapipe.synth.figure import Appearance, Colour, Fabric, Pixels, Pose


@dataclass
class Canvas:
    """Pixels that outlines in figure coordinates are painted onto."""

    pixels: Pixels  # [H, W, 3], 0..1, painted in place
    scale: float  # pixels per figure unit
    left: float  # pixel column of x = 0
    top: float  # pixel row of y = 0
    light: float = 0.0

    def paint(self, outline: Pixels, fabric: Fabric | Colour, *, round_: float = 0.3, opacity: float = 1.0) -> None:
        """Fill an outline [N, 2] (x, y); `round_` darkens its sides, which makes a flat shape look round."""
        points = outline * self.scale + (self.left, self.top)
        height, width = self.pixels.shape[:2]
        x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillPoly(mask, [np.round((points - (x0, y0)) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        alpha = (mask.astype(np.float32) * (opacity / 255))[..., None]
        part = self.pixels[y0:y1, x0:x1]
        part += alpha * (self._colours(fabric, x0, x1, y0, y1) * self._shade(points, x0, x1, round_) - part)

    def _colours(self, fabric: Fabric | Colour, x0: int, x1: int, y0: int, y1: int) -> Pixels:
        if not callable(fabric):
            return np.asarray(fabric, np.float32)
        x = ((np.arange(x0, x1, dtype=np.float32) - self.left) / self.scale)[None, :]
        y = ((np.arange(y0, y1, dtype=np.float32) - self.top) / self.scale)[:, None]
        return fabric(x.astype(np.float32), y.astype(np.float32))

    def _shade(self, points: Pixels, x0: int, x1: int, round_: float) -> Pixels:
        low, high = points[:, 0].min(), points[:, 0].max()
        across = (np.arange(x0, x1, dtype=np.float32) * 2 - low - high) / max(high - low, 1.0)
        return (1 - round_ * across * (across - 0.6 * self.light))[None, :, None].astype(np.float32)

    def text(self, text: str, centre: tuple[float, float], height: float, colour: Colour) -> None:
        """Bold letters, `height` figure units high, about a point."""
        scale = height * self.scale / 22
        thickness = max(1, round(4 * scale))
        (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        mask = np.zeros(self.pixels.shape[:2], np.uint8)
        corner = (
            round(centre[0] * self.scale + self.left - wide / 2),
            round(centre[1] * self.scale + self.top + high / 2),
        )
        cv2.putText(mask, text, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
        self.pixels += (mask.astype(np.float32) / 255)[..., None] * (np.asarray(colour, np.float32) - self.pixels)


def limb(start: tuple[float, float], end: tuple[float, float], width: float, end_width: float) -> Pixels:
    """Outline of a tapered stroke with round ends."""
    a, b = np.asarray(start), np.asarray(end)
    angle = np.arctan2(b[1] - a[1], b[0] - a[0])
    turns = np.linspace(np.pi / 2, 3 * np.pi / 2, 6) + angle
    back = a + width / 2 * np.stack([np.cos(turns), np.sin(turns)], 1)
    front = b + end_width / 2 * np.stack([np.cos(turns + np.pi), np.sin(turns + np.pi)], 1)
    return np.concatenate([back, front]).astype(np.float32)


def ellipse(x: float, y: float, half_width: float, half_height: float, *, start: float = 0, end: float = 360) -> Pixels:
    """Outline of an ellipse or of the part between two angles (degrees, clockwise from the right)."""
    turns = np.deg2rad(np.linspace(start, end, 20))
    return np.stack([x + half_width * np.cos(turns), y + half_height * np.sin(turns)], 1).astype(np.float32)


def box(x0: float, y0: float, x1: float, y1: float) -> Pixels:
    """Outline of a rectangle."""
    return np.asarray([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float32)


SHOULDERS, WAIST, HIPS, KNEES, ANKLES = 0.175, 0.42, 0.5, 0.74, 0.955


def paint_figure(canvas: Canvas, who: Appearance, pose: Pose) -> None:
    """Paint one person, back to front. A view from the right is the mirror image of one from the left."""
    canvas.light = pose.light
    if pose.view == "right":
        mirrored = Canvas(canvas.pixels[:, ::-1].copy(), canvas.scale, canvas.pixels.shape[1] - canvas.left, canvas.top)
        mirrored.light = -pose.light
        _paint_sideways(mirrored, who, pose)
        canvas.pixels[:] = mirrored.pixels[:, ::-1]
    elif pose.view == "left":
        _paint_sideways(canvas, who, pose)
    else:
        _paint_upright(canvas, who, pose)
    _fold(canvas, pose)


def _paint_upright(canvas: Canvas, who: Appearance, pose: Pose) -> None:
    """From the front or the back."""
    _shadow(canvas, 0.13)
    swing = pose.stride * np.sin(pose.phase)
    hips = 0.075 * who.build
    for side in (-1, 1):
        lift = max(0.0, side * swing) * 0.35
        foot = (side * hips * 0.62, ANKLES - lift)
        _leg(canvas, who, (side * hips * 0.55, HIPS), (side * hips * 0.66, KNEES - lift / 2), foot, 0.0)
    shoulders = 0.108 * who.build
    if who.bag == "hand":
        _hand_bag(canvas, who, pose.side(who.bag_side) * (shoulders + 0.035))
    for side in (-1, 1):
        elbow = (side * (shoulders + 0.016), 0.335)
        _arm(
            canvas,
            who,
            (side * (shoulders - 0.012), SHOULDERS + 0.022),
            elbow,
            (elbow[0] + side * 0.004, 0.47 - side * swing * 0.3),
        )
    _torso(canvas, who, shoulders, hips)
    if pose.view == "front":
        _front(canvas, who, shoulders)
    elif who.back_print and who.logo:
        canvas.text(who.logo, (0.0, 0.29), 0.07, who.logo_colour)
    _head(canvas, who, pose)
    _bag_upright(canvas, who, pose, shoulders)


def _paint_sideways(canvas: Canvas, who: Appearance, pose: Pose) -> None:
    """Facing the left edge of the image; the far limbs first."""
    _shadow(canvas, 0.16)
    swing = pose.stride * np.sin(pose.phase)
    depth = 0.062 * who.build
    near = 1 if pose.view == "left" else -1  # seen from there, the person's left side is the near one
    if who.bag == "shoulder" and who.bag_side != near:
        canvas.paint(box(0.0, 0.4, depth + 0.03, 0.5), who.bag_colour)
    _arm(canvas, who, (0.0, SHOULDERS + 0.025), (swing * 0.7, 0.335), (swing * 1.2 - 0.02, 0.46))
    for side in (-1, 1):
        ankle = side * pose.stride * np.cos(pose.phase)
        bend = -0.02 - 0.25 * abs(ankle)
        _leg(canvas, who, (0.0, HIPS), (ankle * 0.5 + bend, KNEES), (ankle, ANKLES), -0.035)
    if who.bag == "backpack":
        canvas.paint(ellipse(depth + 0.02, 0.29, 0.052, 0.105), who.bag_colour)
    _torso(canvas, who, depth, depth * 1.05)
    if who.inner and who.coat < 0.1:
        canvas.paint(box(-depth, SHOULDERS + 0.03, -depth + 0.014, WAIST), who.inner)
    _head(canvas, who, pose)
    if who.bag == "hand" and who.bag_side == near:
        _hand_bag(canvas, who, -swing * 1.2)
    _arm(canvas, who, (0.004, SHOULDERS + 0.028), (-swing * 0.7, 0.34), (-swing * 1.2 - 0.02, 0.47))
    if who.bag == "backpack":
        canvas.paint(limb((depth * 0.5, 0.185), (depth * 0.5, 0.33), 0.018, 0.018), who.bag_colour)
    elif who.bag == "shoulder" and who.bag_side == near:
        canvas.paint(limb((-0.01, 0.17), (0.01, 0.4), 0.013, 0.013), who.bag_colour)
        canvas.paint(box(-0.045, 0.39, 0.06, 0.5), who.bag_colour)


def _shadow(canvas: Canvas, half_width: float) -> None:
    canvas.paint(ellipse(0.0, 0.985, half_width, 0.022), (0.06, 0.06, 0.07), round_=0, opacity=0.45)


def _leg(
    canvas: Canvas,
    who: Appearance,
    hip: tuple[float, float],
    knee: tuple[float, float],
    ankle: tuple[float, float],
    toe: float,
) -> None:
    """Thigh, shin and shoe; `toe` is how far the shoe points to the side. A skirt is part of the torso."""
    thick = 0.082 * who.build
    thigh: Fabric | Colour = who.skin if who.legs == "skirt" else who.lower
    shin: Fabric | Colour = who.lower if who.legs == "trousers" else who.skin
    slim = 0.74 if who.legs == "trousers" else 0.56
    canvas.paint(limb(knee, ankle, thick * slim, thick * slim * 0.75), shin)
    canvas.paint(limb(hip, knee, thick, thick * 0.8), thigh)
    canvas.paint(
        limb((ankle[0] - toe * 0.25, ankle[1] + 0.018), (ankle[0] + toe, ankle[1] + 0.025), 0.044, 0.036), who.shoes
    )


def _arm(
    canvas: Canvas,
    who: Appearance,
    shoulder: tuple[float, float],
    elbow: tuple[float, float],
    hand: tuple[float, float],
) -> None:
    thick = 0.05 * (0.6 + 0.4 * who.build)
    sleeve: Fabric | Colour = who.sleeves or who.upper
    canvas.paint(ellipse(hand[0], hand[1] + 0.012, 0.016, 0.022), who.skin)
    canvas.paint(limb(elbow, hand, thick * 0.8, thick * 0.62), who.skin if who.short_sleeves else sleeve)
    canvas.paint(limb(shoulder, elbow, thick, thick * 0.9), sleeve, round_=0.4)


def _torso(canvas: Canvas, who: Appearance, shoulders: float, hips: float) -> None:
    canvas.paint(limb((0.0, 0.12), (0.0, 0.175), 0.045, 0.055), who.skin)
    if who.legs == "skirt":
        flare = hips * 1.5
        canvas.paint(np.asarray([(-hips, WAIST), (hips, WAIST), (flare, 0.68), (-flare, 0.68)], np.float32), who.lower)
    else:
        canvas.paint(box(-hips * 1.06, WAIST, hips * 1.06, HIPS + 0.035), who.lower)
    hem = WAIST + 0.035 + who.coat
    right = [
        (0.022, 0.156),
        (shoulders * 0.8, SHOULDERS - 0.006),
        (shoulders, SHOULDERS + 0.025),
        (shoulders * 0.93, 0.3),
        (hips * 1.08, WAIST),
        (hips * 1.14 + 0.1 * who.coat, hem),
    ]
    outline = right + [(-x, y) for x, y in reversed(right)]
    canvas.paint(np.asarray(outline, np.float32), who.upper)


def _front(canvas: Canvas, who: Appearance, shoulders: float) -> None:
    """Collar, open jacket, logo: what only the front shows."""
    canvas.paint(np.asarray([(-0.024, 0.156), (0.024, 0.156), (0.0, 0.19)], np.float32), who.skin)
    if who.inner:
        hem = WAIST + 0.03 + who.coat
        wide = 0.3 * shoulders
        canvas.paint(
            np.asarray([(-wide * 0.6, 0.165), (wide * 0.6, 0.165), (wide, hem), (-wide, hem)], np.float32), who.inner
        )
    elif who.logo:
        canvas.text(who.logo, (0.0 if len(who.logo) > 1 else shoulders * 0.45, 0.25), 0.045, who.logo_colour)


def _hand_bag(canvas: Canvas, who: Appearance, x: float) -> None:
    canvas.paint(limb((x, 0.47), (x, 0.53), 0.05, 0.06), who.bag_colour)
    canvas.paint(box(x - 0.05, 0.52, x + 0.05, 0.62), who.bag_colour)


def _bag_upright(canvas: Canvas, who: Appearance, pose: Pose, shoulders: float) -> None:
    side = pose.side(who.bag_side)
    if who.bag == "backpack" and pose.view == "back":
        canvas.paint(_rounded(0.0, 0.29, 0.72 * shoulders, 0.105), who.bag_colour)
        dark = (0.55 * who.bag_colour[0], 0.55 * who.bag_colour[1], 0.55 * who.bag_colour[2])
        canvas.paint(_rounded(0.0, 0.335, 0.5 * shoulders, 0.042), dark)
    elif who.bag == "backpack":
        for strap in (-1, 1):
            canvas.paint(
                limb((strap * 0.55 * shoulders, 0.172), (strap * 0.72 * shoulders, 0.33), 0.018, 0.016), who.bag_colour
            )
    elif who.bag == "shoulder":
        canvas.paint(limb((-side * 0.6 * shoulders, 0.175), (side * shoulders, 0.42), 0.014, 0.014), who.bag_colour)
        canvas.paint(_rounded(side * (shoulders + 0.012), 0.46, 0.05, 0.055), who.bag_colour)


def _rounded(x: float, y: float, half_width: float, half_height: float) -> Pixels:
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    cos, sin = np.cos(turns), np.sin(turns)
    return np.stack(
        [x + half_width * np.sign(cos) * np.abs(cos) ** 0.4, y + half_height * np.sign(sin) * np.abs(sin) ** 0.4], 1
    ).astype(np.float32)


def _head(canvas: Canvas, who: Appearance, pose: Pose) -> None:
    """Face, hair and cap; sideways the face looks to the left."""
    x, y, wide, high = pose.lean, 0.072, 0.044 * who.head, 0.062 * who.head
    long_ = who.hair_style == "long"
    if long_ and pose.view != "back":
        canvas.paint(_rounded(x + 0.016 * pose.sideways, y + 0.03, wide * 1.12, high * 1.2), who.hair)
    canvas.paint(ellipse(x, y, wide, high), who.skin, round_=0.22)
    if pose.view == "front":
        _face(canvas, (x - 0.017, x + 0.017), y)
    elif pose.sideways:
        _face(canvas, (x - 0.026,), y)
        canvas.paint(ellipse(x - wide, y + 0.012, 0.009, 0.01), who.skin)
    _hair(canvas, who, pose, x, y)


def _face(canvas: Canvas, eyes: tuple[float, ...], y: float) -> None:
    for eye in eyes:
        canvas.paint(ellipse(eye, y - 0.002, 0.007, 0.005), (0.1, 0.08, 0.08), round_=0, opacity=0.8)
    centre = sum(eyes) / len(eyes)
    canvas.paint(ellipse(centre, y + 0.035, 0.012, 0.004), (0.5, 0.2, 0.18), round_=0, opacity=0.6)


def _hair(canvas: Canvas, who: Appearance, pose: Pose, x: float, y: float) -> None:
    wide, high = 0.047 * who.head, 0.066 * who.head
    if who.hair_style == "bald":
        return
    if who.hair_style == "cap":
        canvas.paint(ellipse(x, y - 0.012, wide, high * 0.85, start=180, end=360), who.hat)
        brim = {"front": (0.0, 0.048), "back": (0.0, 0.0)}.get(pose.view, (-0.04, 0.035))
        canvas.paint(ellipse(x + brim[0], y - 0.015, brim[1], 0.011), who.hat)
        if pose.view == "back":
            canvas.paint(ellipse(x, y - 0.012, wide, high * 0.75, start=0, end=180), who.hair)
    elif pose.view == "back":
        canvas.paint(
            _rounded(x, y + 0.03, wide * 1.1, high * 1.25)
            if who.hair_style == "long"
            else ellipse(x, y - 0.006, wide, high),
            who.hair,
        )
    elif pose.sideways:
        canvas.paint(ellipse(x + 0.006, y - 0.006, wide, high, start=215, end=430), who.hair)
    else:
        canvas.paint(ellipse(x, y - 0.012, wide, high * 0.9, start=190, end=350), who.hair)
    if who.hair_style == "bun":
        canvas.paint(ellipse(x + 0.045 * pose.sideways, y - 0.06 + 0.04 * pose.sideways, 0.024, 0.02), who.hair)


def _fold(canvas: Canvas, pose: Pose) -> None:
    """Uneven light over the whole figure, as folds and the sky give."""
    height, width = canvas.pixels.shape[:2]
    shade = cv2.resize(pose.folds, (width, height), interpolation=cv2.INTER_CUBIC)
    canvas.pixels *= (1 + 0.05 * np.asarray(shade, np.float32))[..., None]
