"""A Ray cluster of several nodes on this machine, each with one CPU, and commands that are watched while they run."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from cluster.core.session import prepare
from tests.support.warm_python import python

PATIENCE_S = 480
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 2_000, "health_check_failure_threshold": 3,
         "health_check_initial_delay_ms": 2_000}  # fmt: skip
"""Ray notices a dead machine after seconds in place of half a minute."""


@contextlib.contextmanager
def local_nodes(count: int, *, head_cpus: int = 0) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with a head that does no work and `count` other nodes."""
    prepare()
    from ray.cluster_utils import Cluster

    with TemporaryDirectory(prefix="ray_") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setattr(sys, "executable", python())  # Ray starts its workers with it
        head = {"num_cpus": head_cpus, "include_dashboard": False, "temp_dir": f"{folder}/ray",
                "_system_config": QUICK}  # fmt: skip
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(count):
                cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


class Watched:
    """A running command whose lines are kept as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, []  # type: ignore[var-annotated]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def until(self, found: Callable[[], Any]) -> Any:
        """The first thing that is found; polled, as nobody tells. Fails when the command ends before."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            ended = self.process.poll() is not None  # before the look: what it left at its end is seen
            if something := found():
                return something
            assert not ended, self.end()
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"not within {PATIENCE_S} s: {self.end()}")

    def end(self) -> tuple[int, str, str]:
        """(exit code, output, errors) once the command has ended."""
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        self._reader.join(PATIENCE_S)
        return self.process.wait(PATIENCE_S), "\n".join(self.lines), errors
