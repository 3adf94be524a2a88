"""The line of this project that is being carried out."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLACES = tuple(f"{ROOT / name}/" for name in ("datapipe", "training", "cluster", "tests"))
"""Where the project's own code lies; an environment of packages (`.venv`) may lie beside them."""


def innermost_line(but: str = "", otherwise: str = "elsewhere", deepest: int = 1_000) -> str:
    """File, relative to the root, and line of the innermost frame of the project's own code, looked for in `deepest`
    frames and outside files whose path starts with `but`; `otherwise` where there is none."""
    frame: Any = sys._getframe(1)
    for _ in range(deepest):
        if frame is None:
            break
        name = frame.f_code.co_filename
        if name.startswith(PLACES) and not (but and name.startswith(but)):
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return otherwise
