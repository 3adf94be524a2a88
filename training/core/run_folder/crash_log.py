"""What a process writes on stderr, kept over its death: NCCL's, the driver's and C++'s last words reach the run's log.

A child process passes on what is written on file descriptor 2, by whatever code, and keeps the end of it. When the
process dies without having said that it is done (abort, segmentation fault, SIGKILL) the child writes what it kept
into the rank's log in the run folder:

    last words of process 4711:
    | terminate called after throwing an instance of 'c10::DistBackendError'
    | ...
    that was all of process 4711

The child (`python -m training.core.run_folder.crash_log`) needs next to nothing until then. It is in a session of its
own, as Ctrl-C and a scheduler's signals are for the run, and ignores those that reach it; it ends when the process has
ended.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datapipe.core.stop_signals import SIGNALS, at_end

KEPT_BYTES = 64_000
"""Bytes of the end of the output that are kept."""
DONE = b"done"
LOOK_S = 1.0
PATIENCE_S = 5.0
"""Seconds for the child to end after its process has ended in order."""
NCCL_VARIABLES = {
    "NCCL_DEBUG": "WARN",
    "NCCL_DEBUG_FILE": "/dev/stderr",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
"""Variables with which NCCL reports errors on stderr, and its watchdog ends a process whose collective failed. Set
where the user has not."""
RELEVANT = re.compile(
    r"terminate called|what\(\):|CUDA error|CUDA_ERROR|cuDNN|cuBLAS|NCCL (WARN|error)|ncclUnhandled|ncclSystem"
    r"|ncclRemote|watchdog|timed? ?out|timeout|\bXid\b|\bECC\b|out of memory|Fatal Python error|Segmentation fault"
    r"|Aborted|assert|symbol lookup error|free\(\)|double free|corrupt|Killed|error|exception",
    re.IGNORECASE,
)
_STACK = re.compile(
    r"^(\s+File \"|(Current )?[Tt]hread 0x|Extension modules:|\s*$|frame #\d+|\s*#\d+ |.*@ +0x[0-9a-f]+ )"
)
MOST_LINES, NEAR_LINES = 3, 40
"""Most relevant lines that are kept, and number of lines at the end in which they are looked for."""
HEAD = "last words of process"


@contextlib.contextmanager
def kept(url: str, storage: Any, rank: int, *, log: bool = False) -> Iterator[None]:
    """Keep the last words of this process for as long as the context lasts. `url`, `storage`: the run folder; `log`:
    the most relevant lines also go into log.txt, where nobody else would write them there.

    A process that leaves the context, with an exception too, is not dead: what it has to say it says itself.
    """
    words = start(url, storage, rank, log=log)
    try:
        with at_end(words.end, first=True):  # to be told to end is no death
            yield
    finally:
        words.end()


def start(url: str, storage: Any, rank: int, *, log: bool = False) -> "LastWords":
    """Begin to keep what the process writes, without a context: until `end`, or the death of the process."""
    for name, value in NCCL_VARIABLES.items():
        os.environ.setdefault(name, value)
    about = {"url": url, "storage": dataclasses.asdict(storage), "rank": rank, "pid": os.getpid(), "log": log}
    return LastWords(about)


class LastWords:
    """File descriptor 2 by way of a child process."""

    def __init__(self, about: dict[str, Any]) -> None:
        _flush()
        self._before = os.dup(2)
        output, into = os.pipe()
        leave, self._leave = os.pipe()
        words = [sys.executable, "-m", "training.core.run_folder.crash_log", str(output), str(leave), json.dumps(about)]
        root = str(Path(__file__).parents[3])
        places = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        self._child = subprocess.Popen(
            words, pass_fds=(output, leave), stdin=subprocess.DEVNULL, start_new_session=True, env=environment
        )
        os.close(output)
        os.close(leave)
        os.dup2(into, 2)
        os.close(into)
        self._faults = faulthandler.is_enabled()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable(2)

    def end(self) -> None:
        """This process is done, and alive; stderr is as before."""
        _flush()
        with contextlib.suppress(OSError):
            os.write(self._leave, DONE)
        os.close(self._leave)
        os.dup2(self._before, 2)
        os.close(self._before)
        if not self._faults:
            faulthandler.disable()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(PATIENCE_S)


def relevant_lines(lines: Sequence[str]) -> list[str]:
    """The lines at the end that say why a process ended, at most MOST_LINES, in their order; none where none does."""
    spoken = [line.strip() for line in lines if not _STACK.match(line)][-NEAR_LINES:]
    return [line for line in spoken if RELEVANT.search(line)][-MOST_LINES:]


def of_process(log: str, pid: int) -> list[str] | None:
    """The last words of a process in the text of a rank's log; None where not all of them are there yet."""
    _, head, rest = log.rpartition(f"{HEAD} {pid}:")
    lines = rest.splitlines()[1:]
    ends = next((place for place, line in enumerate(lines) if not line.startswith("|")), len(lines))
    if not head or not any(line.endswith(_tail(pid)) for line in lines[ends : ends + 1]):
        return None
    return [line.removeprefix("|").removeprefix(" ") for line in lines[:ends]]


def _tail(pid: int) -> str:
    """What the line after the last words of a process ends with."""
    return f"that was all of process {pid}"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _accompany(output: int, leave: int) -> tuple[bytes, bool]:
    """In the child: (end of what was written, did the process say that it is done?) once the process has ended."""
    end, word, parent = b"", b"", os.getppid()
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(leave, selectors.EVENT_READ)
        open_ = {output, leave}
        while leave in open_:
            ready = selector.select(LOOK_S)
            if not ready and os.getppid() != parent:
                break  # its death alone, where its children hold its end of the pipe
            for key, _ in ready:
                data = os.read(key.fd, 65_536)
                if not data:
                    selector.unregister(key.fd)
                    open_.discard(key.fd)
                elif key.fd == leave:
                    word += data
                else:
                    end = _pass_on(end, data)
    os.set_blocking(output, False)  # its own children may hold the other end
    with contextlib.suppress(BlockingIOError):
        while output in open_ and (data := os.read(output, 65_536)):
            end = _pass_on(end, data)
    return end, word == DONE


def _pass_on(end: bytes, data: bytes) -> bytes:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, data)
    return (end + data)[-KEPT_BYTES:]


def _write(about: dict[str, Any], lines: Sequence[str]) -> None:
    """Into the rank's log, and where it is wanted into the run's. Raises StorageError."""
    from datapipe.core.config import StorageConfig
    from training.core.run_folder.run_folder import RunFolder

    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    folder = RunFolder(about["url"], StorageConfig(**about["storage"]))
    head, tail = f"{now} ERROR {HEAD} {about['pid']}:", f"{now} ERROR {_tail(about['pid'])}"
    for line in (head, *(f"| {line}" for line in lines), tail):
        folder.append(f"ranks/rank_{about['rank']:02d}.log", line)
    if about["log"]:
        words = " / ".join(relevant_lines(lines) or lines[-MOST_LINES:]) or "none"
        folder.append("log.txt", f"{now} process {about['pid']} died; its last words: {words}")
    folder.flush()


def main(arguments: Sequence[str]) -> int:
    """The child."""
    output, leave, about = int(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    for number in (*SIGNALS, signal.SIGPIPE, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end, done = _accompany(output, leave)
    if not done:
        _write(about, end.decode(errors="replace").splitlines())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
