"""A process that reads inputs one after the other, and says of each what came of it: JSON for JSON, line by line.

It writes nothing but below the folders it was given, starts no process and reaches no network: an audit hook notes
whatever else is tried. Its memory is limited, so that an input that gets through does no harm.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.readers import reader

MOST_BYTES = 5 << 29
"""Address space beyond what the process has at its start."""
ALLOWED = ("/dev/null", "/proc/self/clear_refs")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.chmod": ((0, 2),),
           "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),),
           "os.truncate": ((0, None),), "shutil.rmtree": ((0, 1),)}  # fmt: skip
"""Audit event -> (which of its arguments is a path, which one the folder that it is relative to, as a descriptor)."""
ELSEWHERE = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "socket.connect",
             "socket.getaddrinfo", "pty.spawn")  # fmt: skip


class Watch:
    """Notes what is written, started or called outside of `inside`."""

    def __init__(self) -> None:
        self.inside: tuple[str, ...] = ()
        self.outside: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES:
                self._check(event, path)
        elif event in CHANGES:
            for path, folder in CHANGES[event]:
                number = arguments[folder] if folder is not None and len(arguments) > folder else None
                above = f"/proc/self/fd/{number}" if isinstance(number, int) and number >= 0 else ""
                self._check(event, arguments[path], above)
        elif event in ELSEWHERE:
            self.outside.append(f"{event} {arguments[0]!r}")

    def _check(self, event: str, path: Any, above: str = "") -> None:
        if isinstance(path, str | bytes):
            real = os.path.realpath(os.path.join(above, os.fsdecode(path)))
            if real not in ALLOWED and not f"{real}/".startswith(self.inside):
                self.outside.append(f"{event} {real}")


def status(name: str) -> int:
    """A number of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024


def forget_peak() -> None:
    """The peak counts from here on, where the system lets one say so; else it is that of all inputs so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def heard(log: Path) -> Iterator[io.StringIO]:
    """Standard output and error: of Python as text, of libraries in a file."""
    said, kept = io.StringIO(), os.dup(2)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def judged(watch: Watch, name: str, folder: Path, out: Path) -> dict[str, Any]:
    """What came of an input: exit code, all that was said, a trace if there is one, growth in MB, what was outside."""
    log = out.parent / "stderr"
    code, trace = -1, ""
    watch.outside = []
    forget_peak()
    before = status("VmRSS")
    with heard(log) as said:
        watch.inside = (f"{folder}/", f"{out}/") if reader(name).writes else (f"{out}/",)
        watch.inside += (os.path.realpath(tempfile.gettempdir()) + "/",)
        try:
            code = reader(name).look(folder, out)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            trace = traceback.format_exc()
        watch.inside = ()
    text = said.getvalue() + log.read_bytes().decode("utf-8", "backslashreplace")
    return {"code": code, "said": text, "trace": trace, "growth": status("VmHWM") - before, "outside": watch.outside}


def main() -> None:
    """Until standard input ends. The first line is what the process is, once it is ready."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    watch = Watch()
    names = json.loads(sys.stdin.readline())
    importlib.import_module("webdataset.tariterators")  # loads PyTorch, where there is one
    with tempfile.TemporaryDirectory() as warm:  # what is imported and kept at the first use is no growth
        for name in names:
            folder, out = Path(warm, name, "in"), Path(warm, name, "out")
            folder.mkdir(parents=True)
            out.mkdir()
            reader(name).make(folder)
            with heard(Path(warm, "stderr")):
                reader(name).look(folder, out)
    limit = status("VmSize") * (1 << 20) + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"idle": status("VmRSS")}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = judged(watch, job["reader"], Path(job["in"]), Path(job["out"]))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
