"""Nothing outside `training/methods` tells methods apart: by no type, by no name, by no field of their settings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden import ROOT
from training.methods import known

INSIDE = ROOT / "training" / "methods"
PUBLIC = ("training.methods", "training.methods.base")
"""What others may import."""
OTHER_WORDS = ("task",)
"""Names of values that may be compared with the name of a method, as they are something else: "supervised" is also
what a score is called whose weights were fine-tuned, be it elsewhere."""


def outside() -> list[Path]:
    """All modules that must not know one method from another."""
    found = [path for folder in ("datapipe", "training", "cluster") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if INSIDE not in path.parents]


def imported(source: str) -> Iterator[str]:
    """Modules of methods that a source imports, or names as text."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0]]
        modules = {f"training.methods.{path.stem}" for path in INSIDE.glob("*.py")}
        yield from (name for name in names if name in modules and name not in PUBLIC)


def told_apart(source: str) -> Iterator[str]:
    """Places where a source compares something with the name of a method, or looks into the settings of one."""
    for node in ast.walk(ast.parse(source)):
        if _compares(node) or _looks_inside(node):
            yield ast.unparse(node).splitlines()[0]


def _compares(node: ast.AST) -> bool:
    if isinstance(node, ast.MatchValue):
        return bool(names(node.value))
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(names(side) for side in sides) and not any(_last(side) in OTHER_WORDS for side in sides)


def _looks_inside(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and _last(node.func) in ("getattr", "hasattr", "isinstance"):
        return _is_settings(node.args[0])
    return isinstance(node, ast.Attribute) and _is_settings(node.value) and node.attr != "name"


def names(node: ast.AST) -> set[str]:
    """Names of methods that an expression has as text, in a tuple or set, too."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant)} & set(known())


def _is_settings(node: ast.AST) -> bool:
    """Is it `config.method`, or what is told to be one by its name?"""
    return isinstance(node, ast.Attribute) and node.attr == "method" and _last(node.value) in ("config", "final")


def _last(node: ast.AST) -> str:
    """`chosen.task` -> "task"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_methods__others_import_the_contract_alone() -> None:
    assert len(outside()) > 100
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in outside() for name in imported(path.read_text())]
    assert not wrong


def test_methods__others_never_ask_which_it_is() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {words}" for path in outside() for words in told_apart(path.read_text())]
    assert not wrong


@pytest.mark.parametrize("source", [
    "from training.methods.dino import DinoConfig", "from training.methods import dino", "import training.methods.dino",
    "importlib.import_module('training.methods.supervised')",
])  # fmt: skip
def test_imported__finds_what_is_planted(source: str) -> None:
    assert list(imported(source))


@pytest.mark.parametrize("source", [
    "config.method.name == 'supervised'", "name in ('dino', 'x')", "'pass' != card.get('method')",
    "match name:\n    case 'personvit':\n        pass", "self.config.method.parts",
    "getattr(config.method, 'parts', 0)", "isinstance(config.method, PassConfig)",
])  # fmt: skip
def test_told_apart__finds_what_is_planted(source: str) -> None:
    assert list(told_apart(source))


@pytest.mark.parametrize("source", [
    "chosen.task == 'supervised'", "config.method.name == other", "methods.of(config.method).parts(config.method)",
    "kind.fine_tunes", "name == 'something'", "from training.methods.base import Method",
    "from training import methods",
])  # fmt: skip
def test_told_apart__leaves_the_rest_alone(source: str) -> None:
    assert not list(told_apart(source)) and not list(imported(source))
