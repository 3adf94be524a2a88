"""Curves as inline SVG: no fonts, no addresses, text and axes in the colour of the page around them."""

import html
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PALETTE = ("#3b82f6", "#e0730c", "#149e62", "#a35be0", "#d1467f", "#0f9fb5", "#8f8a1c")
"""Readable on white and on near-black."""
GREY = "#8a8f98"
INK = "#123457"
"""Stands for the colour of the page's text while the figure is drawn."""
MOST_POINTS = 600
"""Longer curves are drawn as means over equal stretches, with the range from lowest to highest behind them."""

TITLE, WIDE_TITLE = 46, 96
"""Letters in a line of a title."""

_STYLE = {
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "font.size": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    strong: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis. `marks`: where training restarted; `levels`: (label, height) of horizontal lines."""

    title: str
    curves: Sequence[Curve]
    xlabel: str = "step"
    marks: Sequence[float] = ()
    levels: Sequence[tuple[str, float]] = ()
    log: bool = False
    zero: bool = False
    wide: bool = False


def to_svg(plot: Plot) -> str:
    """The plot as an `<svg>` element that scales with its place."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": plot.title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.3) if plot.wide else (4.4, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        _draw(figure.subplots(), plot)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), plot.title)


def _draw(axes: Any, plot: Plot) -> None:
    for curve, colour in zip(plot.curves, _colours(len(plot.curves)), strict=True):
        _draw_curve(axes, curve, colour)
    for number, (label, height) in enumerate(plot.levels):
        dashes = ((0, (5, 3)), (0, (1, 2)), (0, (5, 2, 1, 2)))[number % 3]
        axes.axhline(height, color=GREY, linestyle=dashes, linewidth=1.4, label=label)
    for number, mark in enumerate(plot.marks):
        axes.axvline(mark, color=GREY, linewidth=0.8, alpha=0.8, label=None if number else "restart")
    title = textwrap.fill(plot.title, WIDE_TITLE if plot.wide else TITLE)  # what is longer would be cut off
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(plot.xlabel)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    if plot.log and all(value > 0 for curve in plot.curves for value in curve.y):
        axes.set_yscale("log")
    elif plot.zero:
        axes.set_ylim(bottom=0)
    if len(plot.curves) + len(plot.levels) > 1 or plot.marks:
        _legend(axes, plot)


def _legend(axes: Any, plot: Plot) -> None:
    if plot.wide:
        axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(plot.curves) > 1:
        axes.legend(fontsize=8, loc="best")


def _draw_curve(axes: Any, curve: Curve, colour: str) -> None:
    x, low, mean, high = thinned(np.asarray(curve.x, float), np.asarray(curve.y, float))
    if len(x) < len(curve.x):
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    marker = "o" if curve.dots or len(x) == 1 else None
    axes.plot(x, mean, color=colour, linewidth=2.0 if curve.strong else 1.3, marker=marker, ms=4, label=curve.label)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, lowest, mean, highest) over at most MOST_POINTS equal stretches; values that are not finite are left out."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= MOST_POINTS:
        return x, y, y, y
    edges = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    lowest, highest = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    return np.add.reduceat(x, edges) / counts, lowest, np.add.reduceat(y, edges) / counts, highest


def _colours(count: int) -> list[str]:
    return list(PALETTE * math.ceil(count / len(PALETTE)))[:count]


def _inline(svg: str, title: str) -> str:
    """Only what a page needs: no prolog, no metadata, no namespaces, no fixed size, no ids but those referred to."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = body.replace(INK, "currentColor")
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box
    start = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(title, quote=True)}">'
    return start + body[body.index(">") + 1 :]
