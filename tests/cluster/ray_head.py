"""A cluster of one machine as `ray start --head` makes it, on ports and in a folder of its own."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from cluster.core.session import prepare
from tests.support.golden import ROOT
from tests.support.ports import free_port
from tests.support.warm_python import python

PATIENCE_S = 480
NICENESS = "RAY_worker_niceness"
"""Of Ray's workers: as all other processes, or a test with a deadline starves beside other work on the machine."""

AT_ONCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""For a machine that is told to end: it would wait 30 s for work to leave it, and nothing does."""


class Head(NamedTuple):
    """A running `ray start --head`."""

    dashboard: str
    address: str
    pid: int
    """Of the process that the others of the machine are below."""
    session: Path
    """Its temporary folder. With RAY_TMPDIR set to the one that this is in, it is the cluster that was started on this
    machine last."""


@contextlib.contextmanager
def ray_head(
    environment: Mapping[str, str],
    *,
    cpus: int = 2,
    port: int = 0,
    dashboard: int = 0,
    more: Sequence[str] = (),
    own_python: str = "",
) -> Iterator[Head]:
    """One with dashboard. `environment`: all of it, as the shell has it in which it is started; `port`, `dashboard`:
    where the head and its dashboard listen, 0: at a free one; `more`: flags of `ray start`; `own_python`: the machine's
    interpreter, away from the working tree."""
    prepare()
    gcs, dashboard = port or free_port(), dashboard or free_port()
    with TemporaryDirectory(prefix="ray_") as folder:
        words = [own_python, "-m", "ray.scripts.scripts"] if own_python else ray_words()
        line = [*words, "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={gcs}", f"--num-cpus={cpus}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}/ray",
                f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
                "--disable-usage-stats", *more]  # fmt: skip
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(line, env={**environment, **AT_ONCE}, cwd=folder if own_python else ROOT,
                                   stdout=nowhere, stderr=nowhere)  # fmt: skip
        try:
            _answers(f"http://127.0.0.1:{dashboard}/api/version", process)
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", process.pid, Path(folder) / "ray")
        finally:
            process.send_signal(signal.SIGTERM)  # ends the processes that it started
            process.wait(PATIENCE_S)


def ray_words() -> list[str]:
    """The beginning of a command line of Ray's own command, with the tests' interpreter."""
    return [python(), "-m", "ray.scripts.scripts"]


def without_ray(**changes: str) -> dict[str, str]:
    """The environment of a shell that says nothing about Ray, with these changes."""
    kept = {name: value for name, value in os.environ.items() if name == NICENESS or not name.startswith("RAY_")}
    return kept | changes


def _answers(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return once a server answers; it tells nobody when it begins to."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it is there, and wants Ray's token
        except OSError:
            assert process.poll() is None, "`ray start` has ended"
            time.sleep(0.2)
    raise AssertionError(f"nobody answers at {address}")
