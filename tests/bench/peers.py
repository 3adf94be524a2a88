"""Libraries to compare with that do not go with ours: an environment of their own, and a process in it."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.golden import ROOT

HERE = Path(__file__).parent
PINNED = HERE / "peers.txt"
FOLDER = ROOT / ".bench" / "peers"
PYTHON = FOLDER / "bin" / "python"
READY = FOLDER / "ready"
"""Holds the hash of the pinned versions that were installed."""
MISSING = "the bench environment is missing: `python -m tests.bench --setup` (about 0.7 GB, some minutes)"


def ready() -> bool:
    """Whether the environment is there, with the versions that are pinned now."""
    return READY.is_file() and READY.read_text() == _pinned()


def install() -> None:
    """Make the environment, if it is not there. Raises CalledProcessError where no package registry answers."""
    if ready():
        return
    print(f"installing img2dataset and Ray Data into {FOLDER} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", PINNED], check=True)
    READY.write_text(_pinned())


@contextmanager
def peer(name: str) -> Iterator[subprocess.Popen[str]]:
    """A process in the environment that answers `ask`; see peer_process.py."""
    with (open(FOLDER / f"{name}.log", "w") as log,
          subprocess.Popen([PYTHON, HERE / "peer_process.py", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=log, text=True, cwd=FOLDER) as process):  # fmt: skip
        yield process
        process.communicate()  # closes its stdin: it ends


def ask(process: subprocess.Popen[str], files: Path, out: Path) -> int:
    """Have the files written as tars into the new folder `out`; how many there were."""
    assert process.stdin and process.stdout
    print(files, out, sep="\t", file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a peer ended; the logs in {FOLDER} tell why")
    return int(answer)


def _pinned() -> str:
    return hashlib.sha256(PINNED.read_bytes()).hexdigest()
