"""python -m tests.end_to_end.pause training pretrain ...: a command whose run waits, after a step or a line, for the
test that watches it.

The test strikes while the run waits, then lets it go on: what is seen does not depend on which of the two is faster.
Workers of Ray wait as well where `install` is their set-up hook. Runs that wait after a step have to keep an audit log
(`engine.audit`).
"""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.golden import ROOT
from training.core.host import run_lines
from training.trainer.monitoring.observer import StepDone
from training.trainer.monitoring.sample_audit import Audit

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
VARIABLE = "TESTS_PAUSE"
POLL_S = 0.02
PATIENCE_S = 480


class Pause:
    """Ordered by a test: the process that keeps the audit log of `rank` waits when `step` steps are done; or the
    leading rank does, once it has said a line that begins with `line`."""

    def __init__(self, folder: Path, step: int = 0, *, rank: int = 0, line: str = "") -> None:
        self._order = folder / "pause.json"
        self._order.write_text(json.dumps({"line": line} if line else _after(f"ranks/audit_{rank:02d}.jsonl", step)))

    @property
    def environment(self) -> dict[str, str]:
        """For the process that is to wait."""
        return {VARIABLE: str(self._order), "PYTHONPATH": str(ROOT)}

    @property
    def worker_environment(self) -> tuple[str, ...]:
        """For `--cluster.environment`."""
        return (f"{VARIABLE}={self._order}", f"{HOOK}=tests.end_to_end.pause.install")

    def reached(self, process: subprocess.Popen[str]) -> int:
        """The process that waits, once it does. AssertionError where the command ends before."""
        end, waiting = time.monotonic() + PATIENCE_S, _waiting(self._order)
        while not waiting.exists():
            ended = process.poll() is not None
            assert not ended or waiting.exists(), process.communicate()
            assert time.monotonic() < end, "the run does not come to the step"
            time.sleep(POLL_S)
        return int(waiting.read_text())

    def end(self) -> None:
        """Let the process go on, and none wait any more."""
        self._order.unlink()


def _waiting(order: Path) -> Path:
    return order.with_suffix(".waiting")


def _after(log: str, step: int) -> dict[str, str | int]:
    return {"log": log, "step": step}


def install() -> None:
    """Let audit logs and lines of this process wait as ordered."""
    note, say = Audit.step, run_lines.info

    def noting(self: Audit, step: StepDone) -> None:
        note(self, step)
        _wait(lambda ordered: ordered == _after(self._name, step.done))

    def saying(line: str, *words: object, **named: Any) -> None:
        say(line, *words, **named)
        _wait(lambda ordered: "line" in ordered and line.startswith(ordered["line"]))

    Audit.step = noting  # type: ignore[method-assign]
    run_lines.info = saying  # type: ignore[method-assign,assignment]


def _wait(meant: Callable[[dict[str, Any]], bool]) -> None:
    """Wait, if this is what was ordered, until the order is gone."""
    order = Path(os.environ[VARIABLE])
    if order.exists() and meant(json.loads(order.read_text())):
        part = order.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(_waiting(order))
        while order.exists():
            time.sleep(POLL_S)


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
