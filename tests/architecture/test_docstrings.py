"""Docstrings stand alone: an editor shows them without the code and the neighbours around."""

import ast
import re

from tests.support.golden import ROOT

LEANING = re.compile(
    r"(The same\b(?! \w+ (as|of) )|Of |Its |Those |That of |As `|See the module|In place:|Theirs|Ours |Likewise)"
)
"""How texts begin that need the line above, the module or another docstring."""


def leaning(code: str) -> list[str]:
    """Docstrings of functions and classes that begin so."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    return [text.splitlines()[0] for text in texts if LEANING.match(text)]


def test_leaning__is_found() -> None:
    planted = (
        'def f():\n    """The same for people."""\nclass C:\n    """Of all files."""\ndef g():\n    """All files."""\n'
    )
    assert leaning(planted) == ["The same for people.", "Of all files."]


def test_docstrings__stand_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for package in ("datapipe", "training", "cluster")
        for path in (ROOT / package).rglob("*.py")
        for text in leaning(path.read_text())
    }
    assert found == set()
