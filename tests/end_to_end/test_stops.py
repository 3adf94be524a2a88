"""Commands that are told to end while they start, as people and schedulers tell them: one line, the right exit code,
and no process left; from the first step on they save.

A run's environment marks all of its processes, so that none is overlooked.
"""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psutil
import pytest

from datapipe.storage import open_store
from tests.end_to_end.pause import Pause
from tests.end_to_end.tiny import command, generated, recipe
from tests.support.golden import ROOT
from training.checkpoint import complete

PATIENCE_S = 240
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}
MARK = "STOPS_OF_RUN"
HEARD_S = 5
"""Seconds for a process to hear a signal and say so; where others have to hear first it says so at its end."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return generated(tmp_path_factory.mktemp("data"), 30)


def read_until(process: subprocess.Popen[str], beginning: str) -> None:
    """Return once a line of output begins so."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} never came: {seen}, {process.communicate()}")


def marked(mark: str) -> list[str]:
    """Command lines of living processes that a run has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def none_left(mark: str) -> list[str]:
    """Processes of a run that do not go; those that were killed may need a moment."""
    end = time.monotonic() + PATIENCE_S
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def stop(
    words: list[str], beginning: str, number: signal.Signals, pause: Pause | None = None, **environment: str
) -> tuple[int, str, list[str]]:
    """(exit code, output, lines of errors) of a command that gets a signal once a line of its output begins so.
    `pause`: the run waits there until it has been sent, and heard of where that is said at once."""
    mark = uuid4().hex
    process = command(*words, cold=True, **{MARK: mark}, **environment)
    if pause:
        pause.reached(process)
    read_until(process, beginning)
    process.send_signal(number)
    if pause:
        assert process.stderr is not None
        select.select([process.stderr], [], [], HEARD_S)
        pause.end()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in output + errors, output + errors
    assert not none_left(mark)
    return process.returncode, output, errors.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("beginning", "number"), [
    ("pretrain: starting", signal.SIGINT), ("builds", signal.SIGTERM), ("rehearses", signal.SIGHUP),
    ("reads the first batch", signal.SIGINT)])  # fmt: skip
def test_pretrain__ends_at_once_while_it_starts(
    tmp_path: Path, manifest: str, beginning: str, number: signal.Signals
) -> None:
    words = ["training", "pretrain", str(recipe(tmp_path, manifest, str(tmp_path / "run"), epochs=1e5))]
    if beginning == "pretrain: starting":  # before there is anything that could wait
        code, output, errors = stop(words, beginning, number)
    else:
        pause = Pause(tmp_path, line=beginning)
        code, output, errors = stop(["tests.end_to_end.pause", *words], beginning, number, pause, **pause.environment)
    assert code == CODES[number]
    assert len(errors) == 1 and errors[0].startswith(("stopped by ", "Ctrl-C: stopping")), errors
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*")) and "go on with" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_pretrain__saves_from_the_first_step_on(tmp_path: Path, manifest: str, number: signal.Signals) -> None:
    path = recipe(tmp_path, manifest, str(tmp_path / "run"), epochs=1e5)
    code, output, errors = stop(["training", "pretrain", str(path)], "step ", number)
    assert code == 75 and "go on with: python -m training pretrain" in output
    assert errors == [f"{number.name}: stopping; the step is finished and saved first; a second signal stops at once"]
    assert complete(open_store(str(tmp_path / "run" / "checkpoints")))


@pytest.mark.slow
def test_pretrain__saves_when_its_terminal_is_closed(tmp_path: Path, manifest: str) -> None:
    """Output to a terminal that is gone is an error; the save matters more."""
    path = recipe(tmp_path, manifest, str(tmp_path / "run"), epochs=1e5)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "training", "pretrain", str(path)], cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: os.close(os.open(os.ttyname(1), os.O_RDWR)))  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"step " not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)  # the kernel sends SIGHUP
    assert process.wait(PATIENCE_S) == 75
    assert complete(open_store(str(tmp_path / "run" / "checkpoints")))


@pytest.mark.slow
@pytest.mark.parametrize(("beginning", "number"), [
    ("starts Ray", signal.SIGTERM), ("starts the workers", signal.SIGINT), ("builds", signal.SIGUSR1)])  # fmt: skip
def test_pretrain_job__ends_at_once_while_it_starts(
    tmp_path: Path, manifest: str, beginning: str, number: signal.Signals
) -> None:
    """No process of Ray and no folder of it is left."""
    path = recipe(tmp_path, manifest, str(tmp_path / "run"), epochs=1e5)
    words, pause = ["cluster", "pretrain", str(path)], None
    if beginning == "builds":  # said by a worker
        pause = Pause(tmp_path, line=beginning)
        words += ["--cluster.environment", *pause.worker_environment]
    with TemporaryDirectory(prefix="stops_") as scratch:  # not below tmp_path: sockets want short names
        code, output, errors = stop(words, beginning, number, pause, TMPDIR=scratch,
                                    TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
                                    **(pause.environment if pause else {}))  # fmt: skip
        left = sorted(str(path.relative_to(scratch)) for path in Path(scratch).rglob("*"))
        assert not left, "\n".join([output, *errors, *left])
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (code, errors) == (CODES[number], [f"stopped by {name} before the first step: nothing needed saving"])
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*")), output


@pytest.mark.slow
def test_evaluate_and_demo__end_at_once(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> None:
    code, output, errors = stop(["cluster", "demo", "--out", str(tmp_path / "demo")], "$ python -m datapipe synth",
                                signal.SIGTERM)  # fmt: skip
    assert code == 75 and len(errors) == 1 and errors[0].startswith("stopped by SIGTERM"), errors
    assert "demo complete" not in output
    write_crops(tmp_path / "crops", 24)
    words = ["training", "evaluate", str(tmp_path / "absent"), "--data", str(tmp_path / "crops")]
    assert stop(words, "evaluate: starting", signal.SIGINT)[::2] == (130, ["stopped by Ctrl-C"])
