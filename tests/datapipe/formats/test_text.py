"""Text files read the same whatever program saved them: byte order marks, UTF-16 and UTF-32, any line ends."""

import codecs
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.errors import ConfigError, DataError
from datapipe.formats.text import NoText, decode_text
from datapipe.sources.video_boxes import read_mot
from training.config import recipe_toml
from training.reid.datasets.read_part import _lines

SAVED = {
    "plain": lambda text: text.encode(),
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "mark, windows": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16, windows": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}
"""As Notepad, PowerShell and other programs save a text."""


@pytest.mark.parametrize("saved", SAVED)
def test_text__is_the_same(saved: str) -> None:
    text = 'name = "crops"  # größe\nsecond\n'
    assert decode_text(SAVED[saved](text)).replace("\r\n", "\n") == text


@pytest.mark.parametrize("saved", SAVED)
def test_text__recipes_boxes_and_lists_are_read(tmp_path: Path, saved: str) -> None:
    save = SAVED[saved]
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(save('out = "there"\nseed = 5\n[optimisation]\nepochs = 3.0\n'))
    config = recipe_toml.load(recipe)
    assert (config.out, config.seed, config.optimisation.epochs) == ("there", 5, 3.0)
    boxes = read_mot(save("1,7,8,20,30,60,1\n3,9,10,20,30,60,1\n"), "boxes")
    assert (boxes.frame.tolist(), boxes.track.tolist()) == ([1, 3], [7, 9])
    names = [("0000/0000_000_01_0303morning_0015_0.jpg", 0), ("0001/0001_000_02_0303noon_0017_1.jpg", 1)]
    assert _lines(save("".join(f"{name} {pid}\n" for name, pid in names))) == names
    assert _lines(save("0000\\0000_000_01.jpg 0\n")) == [("0000/0000_000_01.jpg", 0)]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("größe = 1".encode("latin-1"), "not in UTF-8"),
        (b"PK\x03\x04" + bytes(30), "is a zip"),
        (b"\x1f\x8b" + bytes(30), "compressed by gzip"),
        (codecs.BOM_UTF16_LE + b"a", "no whole UTF-16"),
    ],
)
def test_text__that_is_none_says_what_it_is(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(NoText, match=told):
        decode_text(data)
    (tmp_path / "recipe.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=told) as recipe:
        recipe_toml.load(tmp_path / "recipe.toml")
    assert "UTF-8" in recipe.value.hint and "brackets" not in recipe.value.hint
    with pytest.raises(DataError, match=told):
        read_mot(data, "boxes.txt")


def test_mot__may_be_separated_by_semicolons() -> None:
    assert np.array_equal(read_mot(b"1;7;8;20;30;60", "boxes").corners, [[8, 20, 38, 80]])
