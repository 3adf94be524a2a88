"""Pure: which patches of a view are hidden, from (seed, position, view) alone.

Two laws on a grid of rows x columns: rectangles that overlap until a share is covered (BEiT; here with the rules of
iBOT's ImageFolderMask), or single patches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from math import exp, floor, log, prod, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from datapipe.core.config import Range, Size
from datapipe.core.randomness import Floats, Ints, uniform
from datapipe.core.settings import settings

Masks = NDArray[np.bool_]
"""True: hidden."""

TRIES = 10
"""Rectangles that may be refused in a row before a mask is left as it is."""
AT_ONCE = 24
"""Rectangles whose numbers are drawn together; most masks need no more."""


@settings
class MaskConfig:
    """How patches are hidden."""

    kind: Literal["block", "random"] = "block"
    """"block": overlapping rectangles, the shape of occlusions. "random": single patches."""
    ratios: tuple[float, ...] = (0.0, 0.3)
    """Shares of hidden patches; one of them is drawn for each view, all equally likely. 0: a view without mask."""
    spreads: tuple[float, ...] = (0.0, 0.2)
    """For each of `ratios`: the share is drawn from U(ratio - spread, ratio + spread)."""
    aspect: Range = (0.3, 1 / 0.3)
    """Height over width of a rectangle, drawn log-uniformly."""
    least_area: int = Field(default=0, ge=0)
    """Smallest area that a rectangle aims at, patches. 0: the square of a third of the grid's shorter side."""
    most_area: int = Field(default=0, ge=0)
    """Largest area that a rectangle aims at, patches. 0: all that is still to be hidden."""
    overhang: bool = False
    """May rectangles reach beyond the edge of the grid? Those that may not, as published, hide its middle much more
    often than its edge: at three quarters of 16 x 8, .98 of the time against .2 in the corners, so that what stays
    visible of a person crop is mostly background. Those that may hide all patches about equally often."""

    @model_validator(mode="after")
    def _fits(self) -> "MaskConfig":
        if not self.ratios or len(self.ratios) != len(self.spreads):
            raise ValueError(f"{len(self.ratios)} ratios need as many spreads, not {len(self.spreads)}")
        if any(
            not 0 <= ratio - spread <= ratio + spread < 1
            for ratio, spread in zip(self.ratios, self.spreads, strict=True)
        ):
            raise ValueError("ratio - spread must not fall below 0, ratio + spread not reach 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect = {self.aspect} is not (lowest, highest)")
        return self


@dataclass(frozen=True)
class MaskSpec:
    """What the loader must draw for one masked view."""

    grid: Size
    """(rows, columns) of patches."""
    config: MaskConfig = MaskConfig()
    equal: bool = False
    """Hide the same number of patches in every image: what rectangles leave open is made up patch by patch."""

    def __post_init__(self) -> None:
        if self.equal and (len(self.config.ratios) != 1 or any(self.config.spreads)):
            raise ValueError("equally many patches need a single ratio without spread")

    @property
    def hidden(self) -> int:
        """Hidden patches of every image, where they are equally many."""
        assert self.equal
        return floor(self.config.ratios[0] * prod(self.grid) + 1e-9)


def draw_masks(laws: Sequence[MaskSpec], seed: int, positions: Ints) -> Masks:
    """The masks of the images at these places of the stream, one per law: [laws, images, rows, columns]."""
    return np.stack([_drawn(law, f"mask/{view}", seed, positions) for view, law in enumerate(laws)])


def _drawn(law: MaskSpec, purpose: str, seed: int, positions: Ints) -> Masks:
    """[images, rows, columns]"""
    masks = np.zeros((len(positions), *law.grid), dtype=np.bool_)
    share = _shares(law.config, uniform(seed, f"{purpose}/share", positions, 2))
    if law.config.kind == "block":
        first = uniform(seed, f"{purpose}/0", positions, 4 * AT_ONCE)
        for row, position in enumerate(positions.tolist()):
            numbers = chain(_by_four(first[row]), _later(seed, purpose, position))
            masks[row] = block_mask(law.grid, float(share[row]), numbers, law.config)
    if law.config.kind == "random" or law.equal:
        target = np.floor(share * prod(law.grid) + 1e-9)
        _hide_more(masks, target, uniform(seed, f"{purpose}/patches", positions, prod(law.grid)))
    return masks


def block_mask(grid: Size, share: float, numbers: Iterator[list[float]], config: MaskConfig) -> Masks:
    """Rectangles until `share` of the grid is hidden, never more; [rows, columns].

        while budget = share * rows * columns - hidden > 0:
            at most ten times:
                area   ~ U(least area, min(budget, most area))       (the other way round when less is left)
                aspect ~ exp U(log lowest, log highest)
                height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
                a place anywhere on the grid                         (`overhang`: any that covers some of it)
                hide it, if it is lower and narrower than the grid and hides between 1 and `budget` patches more
            if none was hidden: stop

    `numbers`: four uniform ones for each rectangle.
    """
    mask = np.zeros(grid, dtype=bool)
    budget = share * mask.size
    while budget > 0:
        for four in islice(numbers, TRIES):
            place = _rectangle(grid, budget, four, config)
            fresh = 0 if place is None else mask[place].size - int(mask[place].sum())
            if place is not None and 0 < fresh <= budget:
                mask[place] = True
                budget -= fresh
                break
        else:
            break
    return mask


def _rectangle(grid: Size, budget: float, four: list[float], config: MaskConfig) -> tuple[slice, slice] | None:
    """Where a rectangle would lie; None if it is as high or as wide as the grid."""
    least = config.least_area or (min(grid) // 3) ** 2
    most = min(budget, config.most_area or budget)
    area = least + (most - least) * four[0]
    low, high = log(config.aspect[0]), log(config.aspect[1])
    aspect = exp(low + (high - low) * four[1])
    height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
    if height >= grid[0] or width >= grid[1]:
        return None
    return _stretch(height, grid[0], four[2], config), _stretch(width, grid[1], four[3], config)


def _stretch(length: int, cells: int, unit: float, config: MaskConfig) -> slice:
    """So many neighbouring cells, or what lies on the grid of them."""
    if not config.overhang:
        start = int(unit * (cells - length + 1))
        return slice(start, start + length)
    start = int(unit * (cells + length - 1)) - length + 1
    return slice(max(start, 0), start + length)


def _shares(config: MaskConfig, unit: Floats) -> Floats:
    """The share to hide of each image, from two uniform numbers: which ratio, and where in its spread."""
    which = np.floor(unit[:, 0] * len(config.ratios)).astype(np.int64)
    ratio, spread = np.array(config.ratios)[which], np.array(config.spreads)[which]
    shares: Floats = ratio + spread * (2 * unit[:, 1] - 1)
    return shares


def _hide_more(masks: Masks, target: Floats, unit: Floats) -> None:
    """Hide further patches, those with the smallest numbers, until each mask has as many as it should."""
    flat = masks.reshape(len(masks), -1)
    smallest_first = np.argsort(np.where(flat, 2.0, unit), axis=1)
    rank = np.argsort(smallest_first, axis=1)
    missing = target - flat.sum(axis=1)
    masks |= (rank < missing[:, None]).reshape(masks.shape)


def _by_four(unit: Floats) -> Iterator[list[float]]:
    return iter(unit.reshape(-1, 4).tolist())


def _later(seed: int, purpose: str, position: int) -> Iterator[list[float]]:
    """The numbers beyond the first draw, for as long as somebody asks."""
    place = np.array([position], dtype=np.int64)
    for draws in count(1):
        yield from _by_four(uniform(seed, f"{purpose}/{draws}", place, 4 * AT_ONCE)[0])
