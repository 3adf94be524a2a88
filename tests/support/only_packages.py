"""`python -m tests.support.only_packages A,B MODULE ...`: `python -m MODULE ...` as if only these packages, and what
they need, were installed beside our own."""

import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OWN = {"training", "datapipe", "cluster", "tests"}
HOOK = "_distutils_hack"
"""What setuptools loads into every process."""


def needed_by(packages: Iterable[str]) -> set[str]:
    """The packages and all that they need, as far as it is installed, by normal names."""
    found: set[str] = set()
    open_ = list(packages)
    while open_:
        name = _normal(open_.pop())
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        if name not in found:
            found.add(name)
            open_ += [re.match(r"[\w.-]+", line)[0] for line in wanted if "extra ==" not in line]  # type: ignore[index]
    return found


def hidden(packages: Iterable[str]) -> set[str]:
    """Top-level modules that none of the packages needs."""
    kept = needed_by(packages)
    tops = metadata.packages_distributions()
    return {top for top, homes in tops.items() if not kept & set(map(_normal, homes))} - OWN


class Hiding:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, names: set[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found: ModuleSpec | None = None
        if name.partition(".")[0] not in self._names:
            found = self._finder.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """See the module."""
    packages, *sys.argv = sys.argv[1:]
    names = hidden(packages.split(","))
    if early := {name for name in names if name in sys.modules and name != HOOK}:
        sys.exit(f"already imported: {', '.join(sorted(early))}")
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
