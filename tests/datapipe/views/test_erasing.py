"""Rectangles that views lose once they are normalised, and the noise in them: the law, and what it is a function of."""

import numpy as np
import pytest
from scipy import stats

from datapipe.views.erasing import CHANNELS, RATIO, ErasingSpec, Erasures, draw_erasures

SIZE = (48, 24)
SPEC = ErasingSpec(SIZE, 1.0, (0.02, 1 / 3), logarithmic=True, noise=True)


def drawn(spec: ErasingSpec, positions: np.ndarray, seed: int = 3) -> Erasures:
    found = Erasures.none(spec, len(positions))
    draw_erasures(spec, seed, positions, found)
    return found


def test_erasures__lie_within_timm_s_bounds_and_inside_the_image() -> None:
    found, noise = drawn(SPEC, np.arange(400)), []
    for row, (top, left, height, width) in enumerate(found.rectangle.tolist()):
        share = height * width / (SIZE[0] * SIZE[1])
        rounding = (height + width) / (SIZE[0] * SIZE[1])
        assert SPEC.area[0] - rounding < share < SPEC.area[1] + rounding
        assert RATIO[0] * (width - 1) < height + 1 and height - 1 < RATIO[1] * (width + 1)
        assert 0 <= top <= SIZE[0] - height and 0 <= left <= SIZE[1] - width
        noise.append(found.noise[row, : CHANNELS * height * width])
        assert CHANNELS * height * width <= SPEC.numbers
    flat = np.concatenate(noise)
    assert np.array_equal(found.flat(), flat) and (flat != 0).all()
    assert stats.kstest(flat[::17], "norm").pvalue > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (16, 400), (384, 128)])
@pytest.mark.parametrize("most", [0.02, 1 / 3, 0.99])
def test_erasures__find_room_for_their_noise_in_images_of_any_shape(size: tuple[int, int], most: float) -> None:
    spec = ErasingSpec(size, 1.0, (0.02, most), logarithmic=True, noise=True)
    found = drawn(spec, np.arange(200))
    assert (found.rectangle[:, 2] * found.rectangle[:, 3]).max() * CHANNELS <= spec.numbers


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_erasures__come_as_often_as_asked(probability: float) -> None:
    spec = ErasingSpec(SIZE, probability, (0.02, 0.4), logarithmic=False, noise=False)
    found = drawn(spec, np.arange(1_000))
    count = int((found.rectangle[:, 2] > 0).sum())
    assert abs(count - 1_000 * probability) < 4 * (1_000 * probability * (1 - probability)) ** 0.5 + 1
    assert found.noise.size == 0 and found.flat().size == 0


def test_erasures__are_a_function_of_seed_and_position() -> None:
    spec = ErasingSpec(SIZE, 0.7, (0.02, 1 / 3), logarithmic=True, noise=True)
    whole, part = drawn(spec, np.arange(6)), drawn(spec, np.array([5, 2, 0]))
    assert np.array_equal(part.rectangle, whole.rectangle[[5, 2, 0]])
    assert np.array_equal(part.noise, whole.noise[[5, 2, 0]])
    assert not np.array_equal(drawn(spec, np.arange(6), seed=4).rectangle, whole.rectangle)
    assert np.array_equal(whole.rows(slice(2, 4)).flat(), drawn(spec, np.array([2, 3])).flat())
