"""What a process says before it dies, by whatever code, is in the run folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.core.config import StorageConfig
from tests.conftest import S3Server
from tests.support.golden import ROOT
from training.core.run_folder.crash_log import of_process, relevant_lines
from training.core.run_folder.run_folder import RunFolder

PATIENCE_S = 120
DYING = """
import ctypes, os, sys
from datapipe.core.config import StorageConfig
from training.core.run_folder import crash_log as last_words
url, endpoint, way = sys.argv[1:]
with last_words.kept(url, StorageConfig(endpoint_url=endpoint), 3, log=True):
    print("a warning", file=sys.stderr)
    os.write(2, b"NCCL WARN Cuda failure 700 'an illegal memory access was encountered'\\n")
    if way == "abort":
        ctypes.CDLL(None).abort()
    if way == "kill":
        os.kill(os.getpid(), 9)
    if way == "raise":
        raise ValueError("of Python's own")
print("done", file=sys.stderr)
"""


def _die(url: str, way: str, endpoint: str = "") -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-c", DYING, url, endpoint, way]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    return process, process.communicate(timeout=PATIENCE_S)[1]  # the child has ended, too: it holds the pipe


@pytest.mark.slow
@pytest.mark.parametrize(("way", "number"), [("abort", signal.SIGABRT), ("kill", signal.SIGKILL)])
def test_words__of_a_process_that_dies(tmp_path: Path, way: str, number: int) -> None:
    process, shown = _die(str(tmp_path / "run"), way)
    assert process.returncode == -number
    log = (tmp_path / "run" / "ranks" / "rank_03.log").read_text()
    words = of_process(log, process.pid)
    assert words is not None and words[:2] == ["a warning", words[1]] and words[1].startswith("NCCL WARN Cuda")
    assert (way == "abort") == ("Fatal Python error: Aborted" in words)  # and where it was, from faulthandler
    assert "NCCL WARN Cuda failure 700" in shown  # a person sees it as before
    assert "NCCL WARN Cuda failure 700" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["end", "raise"])
def test_words__of_a_process_that_ends_by_itself_are_its_own(tmp_path: Path, way: str) -> None:
    process, shown = _die(str(tmp_path / "run"), way)
    assert process.returncode == (way == "raise") and not (tmp_path / "run").exists()
    assert "a warning" in shown and (("done" in shown) if way == "end" else ("of Python's own" in shown))


@pytest.mark.slow
def test_words__reach_an_object_store(s3: S3Server) -> None:
    url = f"s3://{s3.bucket()}/run"
    before = RunFolder(url, s3.storage)
    before.append("ranks/rank_03.log", "said before")
    before.flush()
    process, _ = _die(url, "abort", s3.endpoint)
    log = RunFolder(url, StorageConfig(endpoint_url=s3.endpoint)).read_text("ranks/rank_03.log") or ""
    assert log.startswith("said before\n") and "NCCL WARN" in "".join(of_process(log, process.pid) or ())


LOG = """2026-11-29 10:00:00 INFO training.trainer.monitoring.rank_log: rank 0 of 2
2026-11-29 10:00:09 ERROR last words of process 41:
| [rank1]:[E1129 ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)
|
| Fatal Python error: Aborted
|   File "x.py", line 3 in error
2026-11-29 10:00:09 ERROR that was all of process 41
2026-11-29 10:00:19 ERROR last words of process 42:
2026-11-29 10:00:19 ERROR that was all of process 42
2026-11-29 10:00:20 INFO training.trainer.monitoring.rank_log: rank 0 of 2
"""


@pytest.mark.parametrize(
    ("pid", "found"),
    [
        (
            41,
            lambda words: (
                len(words) == 4 and relevant_lines(words)[0].startswith("[rank1]") and len(relevant_lines(words)) == 2
            ),
        ),
        (42, lambda words: words == []),
        (43, lambda words: words is None),
    ],
)
def test_words__are_found_in_a_ranks_log(pid: int, found: Callable[[list[str] | None], bool]) -> None:
    assert found(of_process(LOG, pid))


@pytest.mark.parametrize("lines", range(2, 6))
def test_words__are_not_there_until_all_of_them_are(lines: int) -> None:
    """They are written line by line, while somebody may look."""
    assert of_process("".join(LOG.splitlines(keepends=True)[:lines]), 41) is None


def test_telling__what_matters() -> None:
    assert relevant_lines(["one", "two", "three", "four"]) == []
    assert relevant_lines(["CUDA error: misaligned address", *map(str, range(9))]) == ["CUDA error: misaligned address"]
    assert relevant_lines([]) == []
    frame = "[2026-11-30 01:50:40,474 E 41 41] logging.cc:474:     @     0x7fa73ecc9c32  1232  ray::RunTask()"
    assert relevant_lines([frame, "Fatal Python error: Aborted"]) == ["Fatal Python error: Aborted"]
    assert relevant_lines(["at 0x7fa73ecc9c32"]) == []
