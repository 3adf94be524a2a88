import math

import pytest
import torch
from torch import Tensor

from training.core import device_copy
from training.nn.positions import grid, in_frame, sincos

ROWS, COLUMNS = 4, 3


def boxes(*rows: tuple[int, int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_grid__is_row_major() -> None:
    assert grid(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("flipped", [0, 1])
def test_in_frame__a_region_in_its_own_frame_has_the_plain_positions(flipped: int) -> None:
    box = boxes((7, 3, 90, 41, flipped), (0, 0, 12, 6, flipped))
    places = in_frame(box, box, ROWS, COLUMNS)
    torch.testing.assert_close(places, grid(ROWS, COLUMNS).expand(2, -1, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(sincos(places, 8), sincos(grid(ROWS, COLUMNS), 8).expand(2, -1, -1), rtol=0, atol=1e-12)


def test_in_frame__a_shifted_region_is_shifted_and_a_smaller_one_is_finer() -> None:
    a = boxes((10, 20, 40, 30, 0))
    patch = 10  # pixels, in both directions
    lower = in_frame(boxes((10 + 2 * patch, 20 - patch, 40, 30, 0)), a, ROWS, COLUMNS)
    torch.testing.assert_close(lower[0], grid(ROWS, COLUMNS) + torch.tensor([2.0, -1.0]))
    upper_left_quarter = in_frame(boxes((10, 20, 20, 15, 0)), a, ROWS, COLUMNS)
    torch.testing.assert_close(upper_left_quarter[0], (grid(ROWS, COLUMNS) + 0.5) / 2 - 0.5)


def test_in_frame__flips_of_either_region() -> None:
    a, b = (10, 20, 40, 30), (20, 20, 40, 30)
    plain = in_frame(boxes((*b, 0)), boxes((*a, 0)), ROWS, COLUMNS)[0]
    both = in_frame(boxes((*b, 1)), boxes((*a, 1)), ROWS, COLUMNS)[0]
    torch.testing.assert_close(both, plain)  # the same columns of the image, so the same picture, mirrored
    one = in_frame(boxes((*b, 1)), boxes((*a, 0)), ROWS, COLUMNS)[0]
    torch.testing.assert_close(one[:, 0], plain[:, 0])
    torch.testing.assert_close(one[:, 1], COLUMNS - 1 - plain[:, 1])


def naive_place(b: list[int], a: list[int], row: int, column: int) -> tuple[float, float]:
    """Where the centre of a patch of B lies, by way of the source image."""
    across = b[3] * (column + 0.5) / COLUMNS
    x = b[1] + (b[3] - across if b[4] else across)
    y = b[0] + b[2] * (row + 0.5) / ROWS
    right = (x - a[1]) / a[3]
    return (y - a[0]) / a[2] * ROWS - 0.5, (1 - right if a[4] else right) * COLUMNS - 0.5


def test_in_frame__equals_naive_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(1, 90, (20, 5), generator=generator) for _ in range(2))
    a[:, 4], b[:, 4] = a[:, 4] % 2, b[:, 4] % 2
    found = in_frame(b.double(), a.double(), ROWS, COLUMNS)
    for image in range(20):
        for row in range(ROWS):
            for column in range(COLUMNS):
                wanted = naive_place(b[image].tolist(), a[image].tolist(), row, column)
                assert found[image, row * COLUMNS + column].tolist() == pytest.approx(wanted, abs=1e-9)


def test_in_frame__empty_boxes_of_padding_give_finite_places() -> None:
    nothing = torch.zeros(2, 5)
    assert in_frame(nothing, nothing, ROWS, COLUMNS).isfinite().all()


def test_tables__are_made_and_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device_copy.table.cache_clear()
    copied: list[Tensor] = []
    real = device_copy.to_device
    monkeypatch.setattr(device_copy, "to_device", lambda values, *where: copied.append(values) or real(values, *where))
    box = boxes((7, 3, 90, 41, 0)).requires_grad_()
    with torch.inference_mode():
        first = sincos(in_frame(box, box, ROWS, COLUMNS), 8)
    assert len(copied) == 3
    again = sincos(in_frame(box, box, ROWS, COLUMNS), 8)
    assert len(copied) == 3 and torch.equal(first, again)
    again.sum().backward()  # which keeps the tables, though inference made them


def test_sincos__equals_naive_loops_and_tells_places_apart() -> None:
    places = torch.tensor([[0.0, 0.0], [1.5, -2.0], [15.0, 7.0]], dtype=torch.float64)
    found = sincos(places, 12)
    for place, code in zip(places.tolist(), found, strict=True):
        wanted = []
        for coordinate in place:
            angles = [coordinate / 10_000 ** (index / 3) for index in range(3)]
            wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert code.tolist() == pytest.approx(wanted, abs=1e-12)
    codes = sincos(grid(16, 8), 32)
    apart = torch.cdist(codes, codes) + 9 * torch.eye(128, dtype=torch.float64)
    assert float(apart.min()) > 0.5
