"""Decoding into a thread's own room: the same images however many fit at a time."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from datapipe.views.decode import decode, decode_runs
from tests.datapipe.crop_set import jpegs

CROPS = list(jpegs(40))


def copies(crops: list[bytes]) -> list[np.ndarray | None]:
    return [None if image is None else image.copy() for _, images in decode_runs(crops) for image in images]


@pytest.fixture(params=["one image at a time", "few images", "all"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    largest = max(decode(crop).nbytes for crop in CROPS)
    size = {"one image at a time": largest, "few images": 3 * largest + 1, "all": 40 * largest}[request.param]
    monkeypatch.setattr("datapipe.views.decode._room.bytes", np.zeros(size, np.uint8))
    return str(request.param)


def test_decode_runs__gives_what_decode_gives(room: str) -> None:
    for found, crop in zip(copies(CROPS), CROPS, strict=True):
        np.testing.assert_array_equal(found, decode(crop))
    runs = [(first, len(images)) for first, images in decode_runs(CROPS)]
    assert [first for first, _ in runs] == np.cumsum([0, *(size for _, size in runs[:-1])]).tolist()
    assert {"all": len(runs) == 1, "few images": 2 < len(runs) < 40}.get(room, len(runs) > 20)


def test_decode_runs__broken_and_odd_images_keep_their_places(room: str) -> None:
    grey = cv2.imencode(".png", np.full((70, 30), 77, np.uint8))[1].tobytes()
    larger = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (2_000, 2_000, 3), np.uint8))[1].tobytes()
    given = [CROPS[0], b"", CROPS[1][:-200], grey, CROPS[2], larger, CROPS[3]]
    found = copies(given)
    assert [image is None for image in found] == [False, True, True, False, False, False, False]
    for place in (0, 3, 4, 5, 6):
        np.testing.assert_array_equal(found[place], decode(given[place]))


def test_decode_runs__threads_do_not_share_their_room() -> None:
    expected = [decode(crop) for crop in CROPS]

    def holds(seed: int) -> bool:
        mine = np.random.default_rng(seed).permutation(len(CROPS)).tolist()
        for first, images in decode_runs([CROPS[number] for number in mine]):
            for place, image in enumerate(images, first):
                if not np.array_equal(image, expected[mine[place]]):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(holds, range(60)))
