"""The command of a Ray job, started again where it was killed: real processes, no Ray."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden import ROOT

KEEP = "import sys; from cluster.keep_alive import keep; sys.exit(keep(sys.argv[3:], int(sys.argv[1]), first_delay_s=" \
       "float(sys.argv[2])))"  # fmt: skip
DRIVER = """
import os, signal, sys
with open(sys.argv[1], "a") as file: file.write("x")
began = os.path.getsize(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if sys.argv[2] == "waits": print("up", flush=True); signal.pause()
if began <= int(sys.argv[2]): os.kill(os.getpid(), int(sys.argv[3]))
sys.exit(int(sys.argv[4]))
"""
"""A command that ends itself by a signal the first times, then with an exit code; it counts its starts in a file."""


def kept(folder: Path, times: int, *words: object, delay_s: float = 0.0) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", KEEP, str(times), str(delay_s), sys.executable, "-c", DRIVER, str(folder / "starts"),
            *map(str, words)]  # fmt: skip
    return subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                            text=True)  # fmt: skip


@pytest.mark.parametrize(("killed", "number", "code", "ended", "starts"), [
    (2, signal.SIGKILL, 0, 0, 3),  # want of memory, twice
    (1, signal.SIGSEGV, 1, 1, 2),  # then a clear error: it stays one
    (9, signal.SIGABRT, 0, 134, 4),  # again and again
    (1, signal.SIGTERM, 75, 75, 1),  # asked to stop
    (0, signal.SIGKILL, 75, 75, 1),
])  # fmt: skip
def test_keep_alive__starts_again_what_was_killed(
    tmp_path: Path, killed: int, number: int, code: int, ended: int, starts: int
) -> None:
    process = kept(tmp_path, 3, killed, int(number), code)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == ended, said
    assert len((tmp_path / "starts").read_text()) == starts
    assert said.count("the driver was killed by ") == (starts - 1 if ended != 134 else starts)


def test_keep_alive__starts_nothing_once_it_is_told_to_stop(tmp_path: Path) -> None:
    """As `ray job stop`, which tells all processes of a job, and after a while kills them."""
    process = kept(tmp_path, 3, "waits")
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(process.pid, signal.SIGTERM)
    os.kill(int(children), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 137 and (tmp_path / "starts").read_text() == "x"


def test_keep_alive__imports_next_to_nothing() -> None:
    look = "import sys, cluster.keep_alive; print([name for name in ('ray', 'torch', 'numpy', 'pydantic') if name in " \
           "sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
