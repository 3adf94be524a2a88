"""The interpreter of the tests is like the real one: what a program is given, what it says, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.golden import ROOT
from tests.support.warm_python import Process, ancestors, descendants, forked, python

SAY = """
import os, sys
print(sys.argv, sys.path[0], __name__, os.getcwd(), os.environ["OWN"], os.getpgid(0) == int(sys.argv[1]))
print("aside", file=sys.stderr)
os.write(int(sys.argv[2]), input().encode())
sys.exit(int(sys.argv[3]))
"""
PRELOADED = "import sys; print('training.trainer.pretrain' in sys.modules)"


def said(interpreter: str, words: list[str], folder: Path) -> tuple[int, str, str, bytes]:
    """(exit code, output, errors, what came through an inherited pipe) of a program, apart from its own names."""
    reading, writing = os.pipe()
    done = subprocess.run([interpreter, *words, str(os.getpgid(0)), str(writing), "7"], cwd=folder, text=True,
                          pass_fds=[writing], input="given\n", capture_output=True,
                          env={**os.environ, "OWN": "ä", "PYTHONPATH": str(ROOT)})  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        return done.returncode, done.stdout.replace(str(writing), "N"), done.stderr, file.read()


@pytest.mark.parametrize("way", [["-c", SAY], ["-m", "say"], ["say.py"], ["-u", "-c", SAY]])
def test_python__is_given_and_says_the_same(way: list[str], tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(SAY)
    assert said(python(), way, tmp_path) == said(sys.executable, way, tmp_path)


@pytest.mark.parametrize("code", [
    "1/0", "import sys; sys.exit('why')", "import os; os.abort()", "raise SystemExit(None)",
    "import sys; sys.exit(300)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "raise KeyboardInterrupt",
    "import atexit; atexit.register(print, 'last')",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print('later'))).start()",
])  # fmt: skip
def test_python__ends_the_same(code: str) -> None:
    both = (python(), sys.executable)
    warm, real = (subprocess.run([one, "-c", code], capture_output=True, text=True) for one in both)
    assert (warm.returncode, warm.stdout) == (real.returncode, real.stdout)
    assert warm.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_python__has_the_slow_imports_behind_it_unless_it_would_import_otherwise() -> None:
    cases = (({}, "True"), ({"DS_ACCELERATOR": "cpu"}, "False"), ({"OMP_NUM_THREADS": "2"}, "False"))
    for changes, expected in cases:
        done = subprocess.run([python(), "-c", PRELOADED], env=os.environ | changes, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
    isolated = subprocess.run([python(), "-I", "-c", PRELOADED], capture_output=True, text=True, check=True)
    assert isolated.stdout.strip() == "False"


@pytest.mark.parametrize(("words", "changes"), [(["-u"], {}), ([], {"PYTHONUNBUFFERED": "1"})])
def test_python__unbuffered_says_at_once_what_it_says(words: list[str], changes: dict[str, str]) -> None:
    line = [python(), *words, "-c", "print('now', end=''); input()"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | changes) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"now"
        process.communicate(b"\n")


RAY = "import sys; print('ray.train' in sys.modules); import ray; print(ray._private.ray_constants.LOGGER_LEVEL)"


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, ["True", "info"]), ({"RAY_TMPDIR": "/elsewhere"}, ["True", "info"]),
    ({"RAY_JOB_ID": "01000000"}, ["False", "info"]), ({"RAY_AUTH_MODE": "token"}, ["False", "info"]),
    ({"RAY_LOGGER_LEVEL": "debug"}, ["False", "debug"]), ({"LANG": "C"}, ["False", "info"]),
    ({"HOME": "/elsewhere", "RAY_ADDRESS": "127.0.0.1:1"}, ["True", "info"]),
])  # fmt: skip
def test_python__has_ray_unless_ray_would_be_imported_otherwise(changes: dict[str, str], expected: list[str]) -> None:
    forked()  # is answered by both servers, once they have imported all
    kept = {"RAY_worker_niceness"}  # `conftest.py` sets it for all; others are left by tests that import Ray
    given = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("RAY_")}
    done = subprocess.run([python(), "-c", RAY], env=given | changes, capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr


OWN = (
    "import training, training.trainer.pretrain, tests, torch, sys; print(training.__file__, tests.__file__, sys.path)"
)


@pytest.mark.parametrize("behind", [False, True])
def test_python__imports_ours_from_a_folder_of_its_own_path(behind: bool, tmp_path: Path) -> None:
    (tmp_path / "training").symlink_to(ROOT / "training")
    path = os.pathsep.join([str(ROOT), str(tmp_path)] if behind else [str(tmp_path), str(ROOT)])
    changed = {**os.environ, "PYTHONPATH": path}
    both = [subprocess.run([one, "-c", OWN], capture_output=True, text=True, cwd="/", env=changed)
            for one in (python(), sys.executable)]  # fmt: skip
    assert both[0].returncode == 0 and both[0].stdout == both[1].stdout, both
    assert ("training" in both[0].stdout.split()[0]) and (str(tmp_path) in both[0].stdout.split()[0]) is not behind


def test_python__obeys_what_a_folder_of_its_path_does_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('at the start')")
    changes = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([python(), "-c", "1"], capture_output=True, text=True, env={**os.environ, **changes})
    assert done.stdout == "at the start\n"


def test_server__survives_clients_that_end_at_any_moment() -> None:
    address = str(Path(python()).parent / ".socket")
    for sent in (b"", b"123", (1000).to_bytes(8, "big"), (1000).to_bytes(8, "big") + b"{", bytes(8)):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.sendall(sent)
    assert subprocess.run([python(), "-c", PRELOADED], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("to", ["the client", "the program"])
def test_signal__ends_both(number: int, to: str) -> None:
    process = Process(
        [python(), "-c", "import time; print(1, flush=True); time.sleep(1000)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None and process.stdout.readline()
    inner = psutil.Process(process.own_pid)
    try:
        assert inner.pid == forked()[process.pid] and process.pid in ancestors(inner.pid)
        assert inner in descendants(os.getpid())
        os.kill(process.pid if to == "the client" else inner.pid, number)
        assert process.wait(60) == -number
        assert psutil.wait_procs([inner], timeout=60)[1] == []
    finally:
        process.kill()
        process.communicate()


def test_signal__ignored_where_whoever_starts_it_ignores_it() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, signal.getsignal(signal.SIGINT))"
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), "text": True}
    both = [subprocess.run([one, "-c", code], capture_output=True, **ignoring) for one in (python(), sys.executable)]
    assert both[0].stdout == both[1].stdout and both[0].stdout.startswith("True ")


@pytest.mark.slow
def test_server__survives_clients_and_programs_that_are_killed_together() -> None:
    words = [python(), "-c", "import time; print(1, flush=True); time.sleep(1000)"]
    for _ in range(5):
        both = [Process(words, stdout=subprocess.PIPE) for _ in range(2)]
        for process in both:
            with process:
                assert process.stdout is not None and process.stdout.readline()
                inner = process.own_pid
                os.kill(inner, signal.SIGKILL)
                os.kill(process.pid, signal.SIGKILL)
                assert process.wait(60) == -signal.SIGKILL
    assert subprocess.run([python(), "-c", PRELOADED], capture_output=True, text=True).stdout == "True\n"
