"""Drop path: for which images of a micro-batch each branch of each block is computed, drawn ahead on the host.

Shapes: B images, D blocks, two branches each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datapipe.core.randomness import uniform
from training.core.device_copy import to_device


class KeptImages(NamedTuple):
    """The images that a branch of a block is computed for."""

    rows: Tensor | None
    """Their places in the batch, int64, on its device. None: all."""
    factor: float
    """Of what the branch adds."""


BlockPaths = Tensor | tuple[KeptImages, KeptImages] | None
"""What drop path leaves of the two branches of a block: factors [2, B], or the images that are kept. None: all."""
Paths = Tensor | tuple[KeptImages, ...] | None
"""The same of all blocks: factors [2 * D, B], or the images that each branch keeps, 2 * D of them."""


def draw_path_masks(rates: Sequence[float], *, seed: int, purpose: str, position: Tensor, views: int) -> Tensor | None:
    """What drop path scales the branches of every block by: [2 * D, views * B] float64 on the host, or None if nothing
    is dropped. `on_device` brings them to where the images are.

    `position` [B] is the images' place in the stream: the same image at the same place drops the same branches on any
    rank, in any micro-batch and after any restart. Best on the host: taken from a GPU, it makes the host wait.

        masks[2 * d + branch, v * B + b] = 0 with probability rates[d], else 1 / (1 - rates[d])
    """
    if not views or not any(rates):
        return None
    branches = 2 * len(rates)
    place = position.detach().cpu().clamp(min=0).numpy()  # padding has position -1
    draws = torch.from_numpy(uniform(seed, purpose, place, views * branches))
    draws = draws.reshape(-1, views, branches).permute(2, 1, 0).reshape(branches, -1)
    rate = torch.tensor(rates, dtype=torch.float64).repeat_interleave(2)[:, None]
    return (draws >= rate) / (1 - rate)


def on_device(masks: Sequence[Tensor | None], device: torch.device, *, whole: bool = False) -> tuple[Paths, ...]:
    """The drop-path factors of several stacks of views, [2 * D, rows] each, as the images that each branch keeps, on
    the device of the images; all in one transfer, which the host does not wait for.

    `whole`: as factors, for blocks that are compiled: every number of images would be compiled anew.
    """
    drawn = [mask for mask in masks if mask is not None]
    if whole and drawn:
        moved = iter(to_device(torch.cat(drawn, dim=1), device).split([mask.shape[1] for mask in drawn], dim=1))
        return tuple(None if mask is None else next(moved) for mask in masks)
    kept = [None if mask is None else _kept(mask) for mask in masks]
    numbers = [rows for stack in kept if stack for rows, _ in stack if rows is not None]
    places = to_device(np.concatenate(numbers), device).split([len(rows) for rows in numbers]) if numbers else ()
    rest = iter(places)
    return tuple(
        None if stack is None
        else tuple(KeptImages(None if rows is None else next(rest), factor) for rows, factor in stack)
        for stack in kept
    )  # fmt: skip


def _kept(mask: Tensor) -> list[tuple[np.ndarray | None, float]]:
    """(images that it keeps, None: all; factor) of each branch. Where a branch keeps none it is computed for one image
    and counts nothing: its parameters have a gradient on every rank then, as ZeRO expects."""
    found: list[tuple[np.ndarray | None, float]] = []
    for factors in mask.numpy():
        rows = np.flatnonzero(factors)
        if len(rows) == len(factors):
            found.append((None, float(factors[0]) if len(rows) else 1.0))
        else:
            found.append((rows, float(factors[rows[0]])) if len(rows) else (np.zeros(1, np.int64), 0.0))
    return found
