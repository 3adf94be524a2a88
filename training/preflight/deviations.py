"""How a run's settings differ from what was published, and from the recipe that comes along."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from datapipe.formats.text import decode_text
from training import methods
from training.config import recipe_toml as recipes
from training.config.continuation import FREE_TO_CHANGE
from training.config.run_config import RunConfig
from training.recipes import SHIPPED

IGNORED = (*FREE_TO_CHANGE, "seed", "stream.", "samples_per_epoch")
"""Keys that are not compared: they change no result, or are the user's data."""


class Deviation(NamedTuple):
    """A key whose value is not the published one."""

    key: str
    ours: Any
    published: Any
    source: str


class UnpublishedChoice(NamedTuple):
    """A key that no publication gives a value for."""

    key: str
    ours: Any
    reason: str
    """Why the recipe has its value: the comment behind it."""
    shipped: Any
    """The recipe's value."""


class Deviations(NamedTuple):
    """A run beside the publication of its method and architecture."""

    recipe: str
    """Name of the recipe that comes along; that of the smallest where the architecture has none; empty: nothing was
    published of the method."""
    data: str
    """What the publication trained on; empty where none was published."""
    differences: list[Deviation]
    choices: list[UnpublishedChoice]
    """What the recipe had to choose, and what this run has chosen besides."""


def compare(config: RunConfig) -> Deviations:
    """Every key that may change the result beside the published value, or beside the recipe's where there is none."""
    name, ours = nearest(config), leaves(config)
    if not name:
        return Deviations("", "", [], [])
    table, data = methods.of(config.method).published[name]
    path = SHIPPED / f"{name}.toml"
    shipped_recipe = path.is_file()  # a method of another package may come without
    shipped, reasons = (leaves(recipes.load(path)), comments(path)) if shipped_recipe else (ours, {})
    compared = {key: value for key, value in {**shipped, **ours}.items() if not key.startswith(IGNORED)}
    differences = [
        Deviation(key, ours.get(key), published.value, published.source)
        for key, published in table.items()
        if ours.get(key) != published.value
    ]
    choices = [
        UnpublishedChoice(key, ours.get(key), reasons.get(key, ""), shipped.get(key))
        for key in compared
        if key not in table and (key in reasons or ours.get(key) != shipped.get(key))
    ]
    return Deviations(name, data, differences, choices)


def nearest(config: RunConfig) -> str:
    """The recipe that is published of the same method and architecture, or weights and size; empty: none is."""
    return methods.of(config.method).nearest_recipe(leaves(config))


def leaves(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value."""
    return dict(recipes.leaves((), recipes.to_tree(config)))


@cache
def comments(path: Path) -> Mapping[str, str]:
    """Dotted key -> the comment behind its value in a recipe; a line of its own above a value belongs to that."""
    comment_of_key: dict[str, str] = {}
    table, above = "", ""
    for line in decode_text(path.read_bytes()).splitlines():
        code, comment = _parted(line)
        if code.startswith("["):
            table, above = f"{code.strip('[]')}.", ""
        elif not code:
            above = comment
        else:
            (key,) = tomllib.loads(code)
            if comment or above:
                comment_of_key[table + key] = comment or above
            above = ""
    return comment_of_key


def _parted(line: str) -> tuple[str, str]:
    """A line of TOML and the comment behind it; a `#` within a string begins none."""
    for place in (place for place, letter in enumerate(line) if letter == "#"):
        try:
            tomllib.loads(line[:place])
        except tomllib.TOMLDecodeError:
            continue
        return line[:place].strip(), line[place + 1 :].strip()
    return line.strip(), ""
