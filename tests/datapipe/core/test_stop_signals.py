"""Signals end a command at once, with one line and no process left, whatever its code is at; or it is unwound."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from datapipe.core import cli, stop_signals
from tests.support.golden import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}
SCRIPT = """
import ctypes, subprocess, sys, time
from datapipe.core import cli as command, stop_signals as stopping
stopping.GRACE_S = 0.5

def main(line):
    child = subprocess.Popen(["sleep", "1000"])
    print(child.pid, flush=True)
    {0}

sys.exit(command.run(main))
"""
WAITING = {
    "sleeps": "time.sleep(1000)",
    "swallows": """
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass""",
    "is in foreign code": """
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # no signal interrupts this one
    """,
}
UNWINDING = """
    from pathlib import Path
    with stopping.unwinding("; go on"):
        try:
            Path(line[0]).touch()
            print("ready", flush=True)
            {0}
        finally:
            Path(line[0]).unlink()
"""


def start(body: str, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen([*before, sys.executable, "-c", SCRIPT.format(body), *words], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def has_ended(handle: int) -> bool:
    """Whether a process is gone, by a descriptor of it; waits."""
    readable, _, _ = select.select([handle], [], [], 60)
    os.close(handle)
    return bool(readable)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("body", WAITING.values(), ids=WAITING)
def test_signal__ends_at_once_with_one_line(number: signal.Signals, body: str) -> None:
    process = start(body)
    child = os.pidfd_open(int(first_line(process)))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (process.returncode, errors) == (CODES[number], f"stopped by {name}\n")
    assert has_ended(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_unwinding__tidies_up(number: signal.Signals, tmp_path: Path) -> None:
    process = start(UNWINDING.format("child.wait()"), str(tmp_path / "temporary"))
    first_line(process)
    assert first_line(process) == "ready" and (tmp_path / "temporary").exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (process.returncode, errors) == (CODES[number], f"stopped by {name}; go on\n")
    assert not (tmp_path / "temporary").exists()


def test_unwinding__ends_all_the_same_when_it_is_swallowed(tmp_path: Path) -> None:
    process = start(UNWINDING.format(WAITING["swallows"].replace("\n", "\n        ")), str(tmp_path / "temporary"))
    first_line(process)
    assert first_line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (75, "stopped by SIGTERM; go on\n")


@pytest.mark.slow
def test_hangup__is_ignored_under_nohup() -> None:
    process = start("time.sleep(0.5); print('lived', flush=True); child.kill()", before=("nohup",))
    first_line(process)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "lived" in output and "stopped" not in errors


def test_listening__gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in CODES]
    with stop_signals.listening() as listener:
        assert listener is not None and stop_signals.current() is listener
        assert signal.getsignal(signal.SIGTERM) != before[1]
        with stop_signals.listening() as inner:
            assert inner is listener
    assert [signal.getsignal(number) for number in CODES] == before and stop_signals.current() is None


def test_receiving__hears_of_a_signal() -> None:
    heard: list[int] = []
    reader, writer = os.pipe()

    def receive(number: int) -> None:
        heard.append(number)
        os.write(writer, b"x")

    with stop_signals.receiving(receive):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert os.read(reader, 1) == b"x"
    assert heard == [signal.SIGUSR1]


@pytest.mark.parametrize("package", ["datapipe", "training", "cluster"])
def test_main__imports_next_to_nothing_before_its_first_words(package: str) -> None:
    """What takes its time comes after signals are heard and the command has said that it starts."""
    look = f"import sys, {package}.__main__; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, text=True, capture_output=True, check=True)
    heavy = {"numpy", "torch", "ray", "pydantic", "rich", "pyarrow", "cv2", "boto3", "psutil"}
    assert not heavy & set(done.stdout.split())


def test_announce__says_what_is_loaded_where_no_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = cli.Command("nowhere:nothing", "Train.", loads="PyTorch", log=True, quiet=("--json",))
    for words in ([], ["--help"], ["recipe", "-h"]):
        chosen.announce("pretrain", words)
    assert capsys.readouterr() == ("", "")
    chosen.announce("pretrain", ["recipe"])
    assert capsys.readouterr() == ("pretrain: starting, loads PyTorch\n", "")
    chosen.announce("pretrain", ["recipe", "--json"])
    assert capsys.readouterr() == ("", "pretrain: starting, loads PyTorch\n")


ENDING = """
import os, signal, subprocess, sys
from pathlib import Path
from datapipe.core import cli, stop_signals

def main(words):
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    def note():
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        Path(words[0]).write_text(f"{child.pid} {state}")
    with stop_signals.at_end(note):
        print("ready", flush=True)
        signal.pause()
        signal.pause()

sys.exit(cli.run(main))
"""


@pytest.mark.slow
def test_at_end__is_called_while_children_stand_still_and_before_they_are_killed(tmp_path: Path) -> None:
    """A library may end the process as soon as its daemons are gone, so that nothing is left to be done after that."""
    process = subprocess.Popen([sys.executable, "-c", ENDING, str(tmp_path / "noted")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED and errors == "stopped by SIGTERM\n"
    pid, state = (tmp_path / "noted").read_text().split()
    assert state == "T"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid)).wait(60)


STARTING = """
import os, shutil, subprocess, sys
from datapipe.core import cli, stop_signals

def main(words):
    with stop_signals.at_end(lambda: shutil.rmtree(words[0], ignore_errors=True)):
        for number in range(1_000):
            os.makedirs(f"{words[0]}/{number}", exist_ok=True)
            subprocess.Popen(["sh", "-c", "mkdir -p $0/$$; echo x > $0/$$/x; exec sleep 1000", words[0]])
            print(number, flush=True)

sys.exit(cli.run(main))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 7, 20, 33])
def test_at_end__comes_when_nothing_more_is_started(after: int, tmp_path: Path) -> None:
    """A signal that finds the main thread at starting processes, which make files: all of them go."""
    folder = tmp_path / "made"
    process = subprocess.Popen([sys.executable, "-c", STARTING, str(folder)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != str(after):
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED and errors == "stopped by SIGTERM\n"
    assert not folder.exists()
    own = os.environ["PYTEST_CURRENT_TEST"]
    found = [
        one.info for one in psutil.process_iter(["cmdline", "environ"]) if one.info["cmdline"] == ["sleep", "1000"]
    ]
    assert own not in [(one["environ"] or {}).get("PYTEST_CURRENT_TEST") for one in found]


FOREIGN = """
import ctypes, signal, sys, time
from datapipe.core import cli, stop_signals

def main(words):
    libc = ctypes.CDLL(None)
    with stop_signals.keeping(signal.SIGTERM):
        libc.signal(signal.SIGTERM, ctypes.c_void_p(signal.SIG_IGN))  # as C++ would, behind Python's back
        libc.usleep(int(words[0]))
        libc.alarm(2)
        print("ready", flush=True)
        time.sleep(1000)

sys.exit(cli.run(main))
"""


@pytest.mark.slow
def test_keeping__puts_back_what_foreign_code_replaces() -> None:
    """While that code still runs; and an alarm that it has set does not keep the process from tidying up."""
    process = subprocess.Popen([sys.executable, "-c", FOREIGN, "500000"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (cli.STOPPED, "stopped by SIGTERM\n")


RECEIVED = """
import sys, time
from pathlib import Path
from datapipe.core import cli, stop_signals

def main(words):
    done = 0
    def note():
        before = done
        time.sleep(0.5)
        Path(words[0]).write_text(f"{done - before}")
    with stop_signals.at_end(note), stop_signals.receiving(lambda number: stop_signals.current().end(number)):
        print("ready", flush=True)
        while True:
            done += 1
            time.sleep(0.001)

sys.exit(cli.run(main))
"""


@pytest.mark.slow
def test_end__stops_the_main_thread_whoever_receives_signals(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", RECEIVED, str(tmp_path / "more")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (cli.INTERRUPTED, "stopped by Ctrl-C\n")
    assert (tmp_path / "more").read_text() == "0"
