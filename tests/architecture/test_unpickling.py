"""Nothing that comes from storage is unpickled in a way that could run code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden import ROOT

FOLDERS = ("datapipe", "training", "cluster")
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
ALLOWED = {
    "datapipe/ingest/work_units.py": "its own temporary file, which no other process has a name for",
    "datapipe/core/plain_pickle.py": "an Unpickler that refuses every name",
    "training/weights/safe_load.py": "only the name of its error; torch.load(weights_only=True) reads",
}
"""Who may import pickle, and why that is safe."""
RUNS_PROGRAMS = "cluster/forking/server.py"
"""It is the interpreter of programs that a process of the same user was to run, and may call `exec` for them."""


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield ast.unparse(node.func), node


def _keyword(call: ast.Call, name: str) -> object:
    values = [word.value for word in call.keywords if word.arg == name]
    return ast.literal_eval(values[0]) if values and isinstance(values[0], ast.Constant) else None


def _faults(path: Path, root: Path = ROOT) -> Iterator[str]:
    name, tree = str(path.relative_to(root)), ast.parse(path.read_text())
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"{name} imports {module}" for module in modules
                    if module.partition(".")[0] in RUNS_CODE and name not in ALLOWED)  # fmt: skip
    for called, call in _calls(tree):
        if called == "torch.load" and _keyword(call, "weights_only") is not True:
            yield f"{name}:{call.lineno} torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and _keyword(call, "allow_pickle") not in (None, False):
            yield f"{name}:{call.lineno} numpy.load with allow_pickle"
        if called in ("pickle.loads", "pickle.load") and name != "datapipe/ingest/work_units.py":
            yield f"{name}:{call.lineno} {called}"
        if called in ("yaml.load", "yaml.unsafe_load", "eval") or called == "exec" and name != RUNS_PROGRAMS:
            yield f"{name}:{call.lineno} {called}"


@pytest.mark.slow
def test_unpickling__nowhere_that_could_run_code() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert [fault for path in files for fault in _faults(path)] == []


def test_unpickling__faults_are_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch, dill\nfrom pickle import loads\nimport pickle\ntorch.load(x)\n"
        "torch.load(x, weights_only=True)\npickle.loads(x)\nnp.load(x, allow_pickle=True)\neval(x)\n"
    )
    assert len(list(_faults(bad, tmp_path))) == 7
