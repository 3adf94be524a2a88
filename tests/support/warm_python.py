"""A Python for tests that has its slow imports behind it: `python -m training ...` begins after .1 s in place of 5.

`started` makes a folder like the one that the interpreter lies in, with a `python` of its own: a client of the server
that `warm_server` describes. Processes of tests that call `python` from there, Ray's workers among them, are forked.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import psutil

from cluster.forking.server import TITLE
from tests.support.golden import ROOT
from tests.support.warm_client import WITH_RAY

FOLDER = "REID_TESTS_WARM_PYTHON"
"""The variable that names the folder to the processes of a test run."""
CLIENT = """#!{real} -ISE
import sys
sys.path.insert(0, {root!r})
sys.argv.insert(1, {own!r})
from tests.support import warm_client
warm_client.main({real!r}, {address!r}, {served!r})
"""


@contextlib.contextmanager
def started() -> Iterator[None]:
    """The server, for as long as this lasts."""
    with TemporaryDirectory(prefix="warm_", dir=_short_folder()) as name:
        folder, own = Path(name), Path(sys.executable)
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join(dict.fromkeys((str(ROOT), *filter(None, given))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        for path in own.parent.iterdir():
            if not path.name.startswith("python"):
                (folder / path.name).symlink_to(path)
        for alias in ("python", "python3"):
            text = CLIENT.format(real=str(own), root=str(ROOT), own=str(folder / alias),
                                 address=str(folder / ".socket"), served=environment)  # fmt: skip
            (folder / alias).write_text(text)
            (folder / alias).chmod(0o755)
        words = [str(own), "-m", "tests.support.warm_server", str(folder / ".socket")]
        server = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdin is not None and server.stdout is not None
        server.stdout.readline()  # it listens
        os.environ[FOLDER] = name
        try:
            yield
        finally:
            del os.environ[FOLDER]
            server.stdin.close()
            server.wait()


def _short_folder() -> str:
    """For temporary files: the address of a socket may have 107 bytes, and the folder's own name takes some of them."""
    return gettempdir() if len(os.fsencode(gettempdir())) < 80 else "/tmp"


def started_cold() -> dict[str, int]:
    """Why processes had to start by themselves, so far, and how many."""
    log = Path(os.environ[FOLDER]) / ".socket.cold"
    return Counter(log.read_text().splitlines()) if log.exists() else {}


def python() -> str:
    """The interpreter for processes of tests; the real one where no server runs."""
    folder = os.environ.get(FOLDER)
    return str(Path(folder) / "python") if folder else sys.executable


def forked() -> dict[int, int]:
    """Process id of a client -> process id of what was forked for it; nothing where no server runs."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return {}
    address = str(Path(folder) / ".socket")
    return _table(address) | _table(address + WITH_RAY)


def _above() -> dict[int, int]:
    """Process id -> that of the process which it stands below, for what was forked for others, here or by the servers
    of Ray's workers: those stand below their raylet, and a worker below the client that leads its process group."""
    found = {inner: client for client, inner in forked().items()}
    servers = {}
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ()).split()
        if words[:1] == [TITLE]:
            servers[process.pid] = int(words[1])
    for process in psutil.process_iter(["ppid"]):
        if process.info["ppid"] in servers and process.pid not in servers:
            with contextlib.suppress(ProcessLookupError):
                found[process.pid] = os.getpgid(process.pid)
    return found | servers


def _table(address: str) -> dict[int, int]:
    """What one server answers."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
            server.sendall(bytes(8))
            with server.makefile("rb") as answer:
                table = json.loads(answer.read())
        except (OSError, ValueError):  # it has ended: what it forked has, too
            return {}
    return {int(client): pid for client, pid in table.items()}


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one, those included that were forked for clients below it."""
    above = _above()
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(above.get(process.pid, process.info["ppid"]), []).append(process.pid)
    found, waiting = [], [pid]
    while waiting:
        here = waiting.pop()
        below = children.get(here, [])
        found += below
        waiting += below
    return [process for one in found for process in _alive(one)]


def ancestors(pid: int) -> list[int]:
    """The processes above one; above a forked one is the client that it was forked for."""
    above = _above()
    found: list[int] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        while pid > 1:
            pid = above[pid] if pid in above else psutil.Process(pid).ppid()
            found.append(pid)
    return found


def _alive(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


class Process(subprocess.Popen[Any]):
    """A process of the interpreter above. Signals go to the forked process itself, as SIGKILL and SIGSTOP have to."""

    @property
    def own_pid(self) -> int:
        """That of the program itself."""
        return forked().get(self.pid, self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.own_pid, number)
