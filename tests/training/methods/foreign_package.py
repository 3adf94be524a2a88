"""A package of others with a method, as it lies in a folder that Python imports from."""

import os
from pathlib import Path

from tests.support.golden import ROOT
from training.methods import GROUP

DOCUMENT = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD = DOCUMENT.partition("```python\n")[2].partition("```")[0]
"""The module `colours`: the example of the document, as it stands."""


def package(folder: Path, content: str = METHOD, *, target: str = "colours:Colours", name: str = "colours") -> Path:
    """An installed package, as Python sees it: a module, and a folder with metadata and its entry point."""
    (folder / f"{name}.py").write_text(content)
    metadata = folder / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """For commands that are to find the packages in a folder."""
    return {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
