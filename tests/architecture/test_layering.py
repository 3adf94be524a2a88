"""The three packages are a one-way street, and so are the rooms in each; no folder is too full to be taken in."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.golden import ROOT

FORBIDDEN = {
    "datapipe": {"training", "cluster", "tests", "torch", "torchvision", "timm", "ray", "deepspeed"},
    "training": {"cluster", "tests", "ray"},
    "cluster": {"tests"},
}
"""Folder -> what none of its files may import, at the top or inside a function."""
ROOMS = {
    "datapipe": ("core", "core/bounds", "core/cli", "formats", "storage", "dataset", "sources", "ingest", "sampling",
                 "views",
                 "stream", "maintain", "synth", "commands"),
    "training": ("recipes", "core", "core/run_folder", "clustering", "nn", "nn/identity", "methods", "weights",
                 "engine", "checkpoint", "reid/datasets", "reid", "config", "preflight/calculated", "preflight",
                 "evaluation",
                 "trainer/monitoring", "trainer", "report", "grid", "commands"),
    "cluster": ("core", "forking", "train/watch", "train", "jobs"),
}  # fmt: skip
"""Package -> its rooms, from the ground up. A room imports only rooms before it, be it inside a function or for types
alone; what lies beside the rooms comes last."""
MOST, MOST_IN_PACKAGE = 13, 16
"""Modules and rooms in a folder; `__init__`, `__main__` and files that are not Python are not counted."""


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@cache
def _files() -> dict[str, Path]:
    """Dotted name -> file below ROOT, of all modules."""
    found = (path.relative_to(ROOT) for folder in ROOMS for path in sorted((ROOT / folder).rglob("*.py")))
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in found}


def _references(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports or names as text."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            yield from [name] if "." in name and name in _files() else ()


@cache
def _edges() -> dict[Path, set[Path]]:
    """File -> files that it imports, wherever in it."""
    files = _files()
    edges: dict[Path, set[Path]] = {}
    for path in files.values():
        near = (name if name in files else name.rpartition(".")[0] for name in _references(path))
        edges[path] = {files[name] for name in near if name in files} - {path}
    return edges


def _without_ends(edges: dict[Path, set[Path]]) -> dict[Path, set[Path]]:
    """What is left when all that leads to nothing else of what is left has been taken away, again and again."""
    left = dict(edges)
    while ends := [node for node, others in left.items() if not others & left.keys()]:
        for node in ends:
            del left[node]
    return {node: others & left.keys() for node, others in left.items()}


def _circles(edges: dict[Path, set[Path]]) -> list[Path]:
    """What lies on a circle, or between two of them."""
    left = _without_ends(edges)
    turned = {node: {other for other in left if node in left[other]} for node in left}
    return sorted(_without_ends(turned))


def _room(path: Path) -> str:
    """Of the rooms of its package the longest that a file lies in; "" for what lies beside them."""
    package, *inside = path.parts
    fitting = [room for room in ROOMS[package] if tuple(inside[: room.count("/") + 1]) == tuple(room.split("/"))]
    return max(fitting, key=len, default="")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layering__imports_point_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in _imports(path)
             if name.partition(".")[0] in FORBIDDEN[folder]]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("package", ROOMS)
def test_layering__a_room_imports_only_rooms_before_it(package: str) -> None:
    floor = {room: number for number, room in enumerate((*ROOMS[package], ""))}
    edges = {path: others for path, others in _edges().items() if path.parts[0] == package}
    assert edges
    wrong = [f"{path}: {other}" for path, others in edges.items() for other in sorted(others)
             if other.parts[0] == package and floor[_room(other)] > floor[_room(path)]]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("package", ROOMS)
def test_layering__every_room_is_on_the_street(package: str) -> None:
    rooms = {path.relative_to(ROOT / package).parent.as_posix() for path in (ROOT / package).rglob("*.py")} - {"."}
    assert rooms == set(ROOMS[package])


def test_layering__no_files_and_no_folders_go_in_circles() -> None:
    assert _circles(_edges()) == []
    folders: dict[Path, set[Path]] = defaultdict(set)
    for path, others in _edges().items():
        folders[path.parent] |= {other.parent for other in others} - {path.parent}
    assert _circles(folders) == []


def test_layering__circles_are_found() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert _circles({a: {b}, b: {c}, c: {b, d}, d: set()}) == [b, c]


def test_layering__no_folder_is_full() -> None:
    inside: dict[Path, set[str]] = defaultdict(set)
    for path in _files().values():
        for depth in range(1, len(path.parts)):
            inside[Path(*path.parts[:depth])].add(path.parts[depth])
    counts = {folder: len(names - {"__init__.py", "__main__.py"}) for folder, names in inside.items()}
    full = {str(folder): count for folder, count in counts.items()
            if count > (MOST if len(folder.parts) > 1 else MOST_IN_PACKAGE)}  # fmt: skip
    assert counts and not full


def test_layering__the_engine_never_says_a_methods_name() -> None:
    allowed = "training.methods.base"
    wrong = [f"{path.name}: {name}" for path in sorted((ROOT / "training" / "engine").glob("*.py"))
             for name in _imports(path) if name.startswith("training.methods") and name != allowed]  # fmt: skip
    assert not wrong


def test_layering__every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for folder in FORBIDDEN for path in sorted((ROOT / folder).rglob("*.py"))
              if not ast.get_docstring(ast.parse(path.read_text()))]  # fmt: skip
    assert not silent
