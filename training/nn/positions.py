"""Where patches are: coordinates on a grid, of one region in the frame of another, and their sin-cos codes.

Shapes: B images, N patches (row-major) on a grid of R rows and G columns, C channels.
"""

import torch
from torch import Tensor

from training.core.device_copy import table

TEMPERATURE = 10_000.0


def grid(rows: int, columns: int) -> Tensor:
    """Row and column of each patch: [N, 2] float64. places[r * columns + g] = (r, g)."""
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.stack([row, column], dim=-1).flatten(0, 1)


def in_frame(boxes_B5: Tensor, frame_B5: Tensor, rows: int, columns: int) -> Tensor:
    """Where the patches of one region lie on the patch grid of another region of the same image: [B, N, 2].

    A box is (top, left, height, width, flipped) in the source image; both regions are shown as R x G patches, mirrored
    where flipped. A patch's place is that of its centre, in patches of the frame, so that a region in its own frame has
    the rows and columns of `grid`; places outside the frame are below 0 or beyond its last row and column.

        y = top + height * (r + 1/2) / R                      in the source image; x alike, from the right where flipped
        place[r * G + g] = (R * (y - frame's top) / frame's height - 1/2, the same for x)
    """
    share_1N2, sides_2 = (
        table(make, rows, columns, device=boxes_B5.device, dtype=boxes_B5.dtype) for make in (_centres, _sides)
    )
    source_BN2 = _corner(boxes_B5) + _extent(boxes_B5) * _mirrored(share_1N2, boxes_B5)
    seen_BN2 = _mirrored((source_BN2 - _corner(frame_B5)) / _extent(frame_B5), frame_B5)
    return seen_BN2 * sides_2 - 0.5


def _sides(rows: int, columns: int) -> Tensor:
    return torch.tensor([rows, columns], dtype=torch.float64)


def _centres(rows: int, columns: int) -> Tensor:
    """[1, N, 2] shares of the sides at which the centres of patches lie."""
    return ((grid(rows, columns) + 0.5) / _sides(rows, columns))[None]


def _corner(boxes_B5: Tensor) -> Tensor:
    return boxes_B5[:, None, :2]


def _extent(boxes_B5: Tensor) -> Tensor:
    """Height and width [B, 1, 2]; at least a pixel, so that the empty boxes of padding give finite places."""
    return boxes_B5[:, None, 2:4].clamp(min=1)


def _mirrored(share_BN2: Tensor, boxes_B5: Tensor) -> Tensor:
    """Shares of the height and of the width; of the latter counted from the other side where the region is flipped."""
    down, across = share_BN2.unbind(-1)
    across = torch.where(boxes_B5[:, None, 4] > 0, 1 - across, across)
    return torch.stack([down.expand_as(across), across], dim=-1)


def sincos(places: Tensor, width: int) -> Tensor:
    """Fixed code of places (row, column): [..., 2] -> [..., C]. C must be a multiple of 4.

    Table of MoCo v3 and BootMAE (`models/modeling_pretrain_bootmae.py` build_2d_sincos_position_embedding), here for
    any places on any rectangle:

        frequency[i] = 10000 ** (-i / (C / 4)), i = 0 .. C / 4 - 1
        code = sin(row * frequency), cos(row * frequency), sin(column * frequency), cos(column * frequency)
    """
    assert width % 4 == 0, f"{width} channels are no multiple of 4"
    frequency = table(_frequencies, width // 4, device=places.device, dtype=places.dtype)
    row, column = (places[..., None] * frequency).unbind(-2)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1)


def _frequencies(count: int) -> Tensor:
    return TEMPERATURE ** (-torch.arange(count, dtype=torch.float64) / count)
