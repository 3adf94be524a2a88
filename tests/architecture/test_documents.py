"""What is written for who carries it on names what is there: every room, and no other."""

import re

import pytest

from tests.architecture.test_layering import ROOMS
from tests.support.golden import ROOT


def rows(text: str) -> list[str]:
    """The folders that a table names in its first column, those within a row as well."""
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    return re.findall(r"`([a-z_/]+)`(?=[:,; |])", table)


def test_tour__has_every_folder_in_the_order_of_the_street() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| `((?:datapipe|training|cluster)/[a-z_/]+)` \| (.+) \|$", text, re.M)
    street = [f"{package}/{room}" for package, rooms in ROOMS.items() for room in rooms]
    assert [folder for folder, _ in named] == street
    assert [words for _, words in named if len(words.split()) > 6] == []


@pytest.mark.parametrize("package", ROOMS)
def test_readme_of_a_package__names_its_rooms(package: str) -> None:
    named = set(rows((ROOT / package / "README.md").read_text()))
    assert {*ROOMS[package]} <= named and all((ROOT / package / name).is_dir() for name in {*ROOMS[package]})
    assert len((ROOT / package / "README.md").read_text().splitlines()) <= 60
