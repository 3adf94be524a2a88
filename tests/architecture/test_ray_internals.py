"""Private parts of Ray are used in one file, which says why: all else holds with any Ray that keeps its promises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden import ROOT

ALLOWED = Path("cluster/core/ray_internals.py")
PRIVATE = re.compile(r"^ray\.(.*\.)?_|^ray\.(train\.v2|dashboard|scripts|serve\._|core)\b")
"""Dotted names in Ray that no promise covers: an underscore anywhere, and packages that are not documented."""
PATHS = re.compile(r"^(ray[./])?[\w./]*/_(private|internal)/|^ray\.[\w.]*\b_\w+")
"""Texts that name such modules or their files."""


def _from_ray(tree: ast.AST) -> set[str]:
    """Names in a module that are Ray's, or something of Ray's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            found |= {(name.asname or name.name).partition(".")[0] for name in node.names
                      if (module or name.name).partition(".")[0] == "ray"}  # fmt: skip
    return found


def private_uses(code: str) -> Iterator[str]:
    """What a module uses of Ray's private parts: imports, attributes, arguments, methods it overrides, texts."""
    tree = ast.parse(code)
    ours = _from_ray(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if PRIVATE.match(name.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (full for name in node.names if PRIVATE.match(full := f"{node.module}.{name.name}"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if ast.unparse(node.value).partition(".")[0] in ours:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).partition(".")[0] in ours:
            yield from (f"{ast.unparse(node.func)}({word.arg}=)" for word in node.keywords
                        if word.arg and word.arg.startswith("_"))  # fmt: skip
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PATHS.match(node.value):
            yield node.value
        elif isinstance(node, ast.ClassDef) and {ast.unparse(base).partition(".")[0] for base in node.bases} & ours:
            yield from (f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)
                        and re.match(r"_[a-z]\w*", method.name) and "super()" in ast.unparse(method))  # fmt: skip


@pytest.mark.parametrize(("code", "found"), [
    ("import ray._private.utils", ["ray._private.utils"]),
    ("from ray import _raylet", ["ray._raylet"]),
    ("def f():\n    from ray.train.v2._internal.exceptions import E", ["ray.train.v2._internal.exceptions.E"]),
    ("from ray.train.v2.api.config import RunConfig", ["ray.train.v2.api.config.RunConfig"]),
    ("import ray\nray._raylet.Config", ["ray._raylet"]),
    ("import ray as r\nr._private.state", ["r._private"]),
    ("import ray\nray.init(_temp_dir='')", ["ray.init(_temp_dir=)"]),
    ("import importlib\nimportlib.import_module('ray._private.services')", ["ray._private.services"]),
    ("from ray.train.torch import TorchTrainer\nclass T(TorchTrainer):\n    def _defaults(self):\n        super()._d()",
     ["T._defaults"]),
    ("from ray.train import get_preemption_info\nimport ray\nray.init(address='')\nray.train.report", []),
])  # fmt: skip
def test_private_uses__are_found(code: str, found: list[str]) -> None:
    assert list(private_uses(code)) == found


def test_private_parts_of_ray__are_used_in_one_file() -> None:
    files = [path for package in ("cluster", "datapipe", "training") for path in sorted((ROOT / package).rglob("*.py"))]
    used = {path.relative_to(ROOT): list(private_uses(path.read_text())) for path in files}
    assert used.pop(ALLOWED)
    assert {str(path): names for path, names in used.items() if names} == {}


def test_private_parts_of_ray__each_with_its_reason() -> None:
    """Whatever imports one says in its docstring what it is for and why nothing public serves."""
    tree = ast.parse((ROOT / ALLOWED).read_text())
    silent = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
              and len((ast.get_docstring(node) or "").split()) < 12]  # fmt: skip
    assert [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert silent in ([], ["TrainInternals"])  # its fields say it
