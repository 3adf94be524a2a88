"""python -m tests.end_to_end.pause training pretrain ...: a command whose run waits, after a step, for the test that
watches it.

The test strikes while the run waits, then lets it go on: what is seen does not depend on which of the two is faster.
Workers of Ray wait as well where `install` is their set-up hook. Runs have to keep an audit log (`engine.audit`).
"""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

from tests.support.golden import ROOT
from training.trainer.monitoring.observer import StepDone
from training.trainer.monitoring.sample_audit import Audit

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
VARIABLE = "TESTS_PAUSE"
POLL_S = 0.02
PATIENCE_S = 480


class Pause:
    """Ordered by a test: the process that keeps the audit log of `rank` waits when `step` steps are done."""

    def __init__(self, folder: Path, step: int, *, rank: int = 0) -> None:
        self._order = folder / "pause.json"
        self._order.write_text(json.dumps({"log": f"ranks/audit_{rank:02d}.jsonl", "step": step}))

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


def install() -> None:
    """Let audit logs of this process wait as ordered."""
    note = Audit.step

    def waiting(self: Audit, step: StepDone) -> None:
        note(self, step)
        order = Path(os.environ[VARIABLE])
        if order.exists() and json.loads(order.read_text()) == {"log": self._name, "step": step.done}:
            part = order.with_suffix(".part")
            part.write_text(str(os.getpid()))
            part.rename(_waiting(order))
            while order.exists():
                time.sleep(POLL_S)

    Audit.step = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
