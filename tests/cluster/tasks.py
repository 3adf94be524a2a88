"""Tasks for Ray's workers, in a module of their own that imports next to nothing: every worker imports it, too."""

import sys
import time
from pathlib import Path

from datapipe.core.errors import DataError

PATIENCE_S = 120


def gated(number: int, opens: int, gate: Path) -> int:
    """Task 0 ends when the gate is open; task `opens` opens it."""
    if number == opens:
        gate.touch()
    end = time.monotonic() + PATIENCE_S
    while number == 0 and not gate.exists():
        assert time.monotonic() < end, "later tasks wait for the first one"
        time.sleep(0.01)
    return number


def busy(number: int, folder: Path) -> int:
    """How many tasks are at work while this one is."""
    (folder / f"{number}.begun").touch()
    time.sleep(0.05)
    at_work = len(list(folder.glob("*.begun"))) - len(list(folder.glob("*.ended")))
    (folder / f"{number}.ended").touch()
    return at_work


def refuse(number: int) -> int:
    """A mistake of the user's in task 3."""
    if number == 3:
        raise DataError("the crop is cut", where="camera 3", hint="mend it")
    return number


def imported() -> set[str]:
    """The packages that a worker holds once it has all code of ingestion."""
    import datapipe.ingest.pipeline

    assert datapipe.ingest.pipeline.__name__ in sys.modules
    return {name.partition(".")[0] for name in sys.modules}
