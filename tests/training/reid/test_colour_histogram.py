"""The colour histogram: its definition, and how hard rendered pedestrians are for it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from datapipe.core.config import SynthConfig
from datapipe.core.errors import DataError
from datapipe.synth.scene import Shot, crop
from training.reid.colour_histogram import BINS, STRIPES, colour_histogram


def striped(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Six rows of 10 pixels each, 20 wide."""
    return np.repeat(np.repeat(np.asarray(colours, np.uint8)[:, None], 10, 0), 20, 1).reshape(60, 20, 3)


def test_colour_histogram__equals_counting_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 11, 3), np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    wanted = np.zeros((STRIPES, *BINS))
    for stripe, rows in enumerate(np.array_split(hsv, STRIPES)):
        for hue, saturation, value in rows.reshape(-1, 3).astype(int):
            wanted[stripe, hue * 8 // 180, saturation // 64, value // 64] += 1 / (len(rows) * 11 * STRIPES)
    np.testing.assert_allclose(colour_histogram([image])[0], np.sqrt(wanted).ravel(), atol=1e-6)


def test_colour_histogram__unit_length_and_order_of_stripes_matters() -> None:
    red, blue = (200, 10, 10), (10, 10, 200)
    up = striped(*[red] * 3, *[blue] * 3)
    features = colour_histogram([up, up[::-1].copy(), up[:, ::2].copy()])
    assert features.shape == (3, 768) and features.dtype == np.float32
    np.testing.assert_allclose(features @ features.T, [[1, 0, 1], [0, 1, 0], [1, 0, 1]], atol=1e-6)


def test_colour_histogram__arrays_bytes_and_paths_agree(tmp_path: Path) -> None:
    data = crop(SynthConfig(), Shot(1, 1, 0))
    (tmp_path / "a.jpg").write_bytes(data)
    pixels = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[..., ::-1].copy()
    rows = colour_histogram([data, tmp_path / "a.jpg", pixels])
    assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()


def test_colour_histogram__nothing_and_not_an_image() -> None:
    assert colour_histogram([]).shape == (0, 768)
    for broken in (b"", b"not a jpeg"):
        with pytest.raises(DataError, match="not an image"):
            colour_histogram([broken])


@pytest.mark.slow
def test_colour_histogram__finds_rendered_people_sometimes() -> None:
    """Better than chance, far from solving it (60 people: 15 to 23 mAP; here 30 people of 4 cameras, 2 images)."""
    config = SynthConfig(images=2)
    shots = [Shot(person, camera, index) for person in range(1, 31) for camera in range(1, 5) for index in range(2)]
    features = colour_histogram(crop(config, shot) for shot in shots)
    people, cameras = (np.asarray([shot[i] for shot in shots]) for i in range(2))
    precision = _mean_average_precision(features @ features.T, people, cameras)
    shuffled = _mean_average_precision(features @ features.T, np.random.default_rng(0).permutation(people), cameras)
    assert 0.12 < precision < 0.45
    assert precision > 2.5 * shuffled


def _mean_average_precision(
    similarity: NDArray[np.float32], people: NDArray[np.int64], cameras: NDArray[np.int64]
) -> float:
    """Every image is a query for the images of other cameras."""
    precisions = []
    for query in range(len(people)):
        others = cameras != cameras[query]
        hits = (people[others] == people[query])[np.argsort(-similarity[query, others])]
        places = np.flatnonzero(hits)
        if len(places):
            precisions.append(float(np.mean(np.arange(1, len(places) + 1) / (places + 1))))
    return float(np.mean(precisions))
