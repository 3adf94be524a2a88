"""The three folders are a one-way street, and each imports only what its machines have."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden import ROOT

FORBIDDEN = {
    "datapipe": {"training", "cluster", "tests", "torch", "torchvision", "timm", "ray", "deepspeed"},
    "training": {"cluster", "tests", "ray"},
    "cluster": {"tests"},
}
"""Folder -> what none of its files may import, at the top or inside a function."""


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layering__imports_point_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in _imports(path)
             if name.partition(".")[0] in FORBIDDEN[folder]]  # fmt: skip
    assert not wrong


def test_layering__the_engine_never_says_a_methods_name() -> None:
    allowed = "training.methods.base"
    wrong = [f"{path.name}: {name}" for path in sorted((ROOT / "training" / "engine").glob("*.py"))
             for name in _imports(path) if name.startswith("training.methods") and name != allowed]  # fmt: skip
    assert not wrong


def test_layering__every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for folder in FORBIDDEN for path in sorted((ROOT / folder).rglob("*.py"))
              if not ast.get_docstring(ast.parse(path.read_text()))]  # fmt: skip
    assert not silent
