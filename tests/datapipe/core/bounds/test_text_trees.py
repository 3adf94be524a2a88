"""JSON and TOML are what the libraries make of them; what nests or expands without end is a ValueError, quickly."""

import json
import time
import tomllib

import pytest

from datapipe.core.bounds.text_trees import BYTES_A_VALUE, FREE_VALUES, parse_json, parse_record, parse_toml
from tests.support.golden import ROOT


def test_json__is_what_the_library_says() -> None:
    tree = {"a": [1, 2.5, None, True], "b": {"c": "x,[{" * 50}, "d": []}
    assert (
        parse_json(json.dumps(tree)) == parse_json(json.dumps(tree).encode()) == tree == parse_record(json.dumps(tree))
    )
    many = json.dumps(list(range(10**6, 10**6 + 300_000)))  # 9 bytes a value: as many as wanted
    assert len(many) > FREE_VALUES and len(parse_json(many)) == 300_000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{", "", "[1]" * 2, "\x00", '"\ud800', b"\xff", "9" * 5_000]
)
def test_json__that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"'])
def test_record__is_an_object(text: str) -> None:
    with pytest.raises(ValueError, match="of type"):
        parse_record(text)


def test_json__of_more_values_than_bytes_allow_is_refused() -> None:
    count = FREE_VALUES * BYTES_A_VALUE // (BYTES_A_VALUE - 6) + 1
    with pytest.raises(ValueError, match="values"):
        parse_json("[" + "[]," * count + "[]]")


def test_toml__of_all_recipes_is_what_the_library_says() -> None:
    recipes = sorted((ROOT / "training" / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert parse_toml(path.read_text()) == tomllib.loads(path.read_text())
    dotted = 'a.b."c.d".e = "x.' + "y." * 60 + '"\nip = "1.2.3.4"\n'
    assert parse_toml(dotted) == tomllib.loads(dotted)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a=" * 100_000,
        ".".join("a" * 100_000) + " = 1",
        "[" + " . ".join(["'a'"] * 100_000) + "]",
        "x = {" + ".".join("a" * 100_000) + " = 1}",
        "#" * (5 << 20),
    ],
)
def test_toml__without_end_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError):
        parse_toml(text)
    assert time.process_time() - began < 5  # the parser takes hours for the long keys
