"""Ranked lists: order, frames, sizes."""

import numpy as np

from training.reid.embed import decode
from training.reid.ranked_lists import FRAME, GAP, RIGHT, TEXT, TILE, WRONG, Tile, ranked_list, to_jpeg


def plain(colour: tuple[int, int, int], height: int = 60, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_ranked_list__frames_tell_right_from_wrong_in_order() -> None:
    colours = [(200, 30, 40), (20, 30, 200), (30, 200, 30)]
    matches = (True, False, True)
    tiles = [Tile(plain(colour), correct, "id 1 c2") for colour, correct in zip(colours, matches, strict=True)]
    picture = ranked_list(plain((9, 9, 9)), "query", tiles, "best query")
    step = TILE[1] + 2 * FRAME + GAP
    top = 2 * GAP + TEXT
    for place, tile in enumerate(tiles, start=1):
        left = 2 * GAP + step * place
        assert tuple(picture[top + 1, left + 40]) == (RIGHT if tile.correct else WRONG)
        assert tuple(picture[top + FRAME + TILE[0] // 2, left + FRAME + TILE[1] // 2]) == colours[place - 1]


def test_ranked_list__pads_wide_images_and_takes_an_empty_list() -> None:
    picture = ranked_list(plain((200, 0, 0), height=30, width=90), "query", [], "alone")
    assert picture.dtype == np.uint8 and picture.shape[0] > TILE[0] and picture.shape[1] > TILE[1]
    middle = GAP + FRAME + TILE[1] // 2
    assert tuple(picture[2 * GAP + TEXT + FRAME + TILE[0] // 2, middle]) == (200, 0, 0)
    assert tuple(picture[2 * GAP + TEXT + FRAME + 3, middle]) == (200, 200, 200)


def test_to_jpeg__keeps_the_picture() -> None:
    picture = ranked_list(plain((120, 60, 200)), "query", [Tile(plain((10, 200, 30)), True, "")], "title")
    back = decode(to_jpeg(picture, 95))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).mean() < 2
