"""Every golden item is held against our code, or waits, by name, for the capability that brings its test."""

import ast

import pytest

from tests.support.golden import ABSENT, ROOT, golden_folder

_ANALYSIS = "analysis of what a backbone has learnt"
WAITING = {
    "attention_maps": _ANALYSIS,
    "pattern_layout": _ANALYSIS,
}
"""Item -> what it waits for."""


def _read_by_tests() -> set[str]:
    """Every string that stands in a test: an item is read by its name."""
    files = [ROOT / "tests" / "support" / "trajectory.py", *sorted((ROOT / "tests").rglob("test_*.py"))]
    trees = [ast.parse(path.read_text()) for path in files if path.name != "test_coverage.py"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {node.value for node in nodes if isinstance(node.value, str)}


def test_coverage__every_item_is_read_by_a_test() -> None:
    items = {path.stem for path in golden_folder().glob("*.json")}
    if not items:
        pytest.skip(f"{ABSENT}: the list of items")
    unread = items - _read_by_tests() - WAITING.keys()
    assert not unread
    assert not WAITING.keys() & _read_by_tests(), "no longer waiting: take it off the list"
