"""Libraries to compare with that do not go with ours: environments of their own, and processes in them."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_path

from tests.support.golden import ROOT

HERE = Path(__file__).parent
Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Environment:
    """The libraries that tests/bench/NAME.txt pins, in .bench/NAME."""

    name: str
    size: str
    borrows: bool = False
    """What is not pinned comes from the project's own environment, such as torch."""

    @property
    def folder(self) -> Path:
        return ROOT / ".bench" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def missing(self) -> str:
        """What to say where it is not there."""
        return f"{self.folder} is missing: `python -m tests.bench --setup` makes it ({self.size}, some minutes)"

    def ready(self) -> bool:
        """Whether it is there, with the versions that are pinned now."""
        mark = self.folder / "ready"
        return mark.is_file() and mark.read_text() == self._digest()

    def install(self) -> None:
        """Make it, if it is not there. Raises CalledProcessError where no package registry answers."""
        if self.ready():
            return
        print(f"installing what {self._pinned.name} lists into {self.folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)
        subprocess.run([self.python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", self._pinned],
                       check=True)  # fmt: skip
        if self.borrows:
            own = subprocess.run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                 check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
            (Path(own) / "borrowed.pth").write_text(get_path("purelib") + "\n")  # behind its own, which come first
        (self.folder / "ready").write_text(self._digest())

    @contextmanager
    def start(self, log: str, *command: str, cwd: Path | None = None) -> Iterator[Process]:
        """Its Python with these arguments; what it says on stderr goes to a log. It is to end with its stdin."""
        with (open(self.folder / f"{log}.log", "w") as errors,
              subprocess.Popen([self.python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                               text=True, cwd=cwd or self.folder) as process):  # fmt: skip
            yield process
            process.communicate()

    @property
    def _pinned(self) -> Path:
        return HERE / f"{self.name}.txt"

    def _digest(self) -> str:
        return hashlib.sha256(self._pinned.read_bytes()).hexdigest()


INGEST = Environment("peers", "0.7 GB")
LOADERS = Environment("loader_peers", "0.2 GB", borrows=True)
NEEDED = {"ingest_peers": INGEST, "loader": LOADERS}
"""Bench -> the environment it needs, or that its other peers need."""


def tell(process: Process, line: str) -> None:
    """Ask for the next piece of work."""
    assert process.stdin
    print(line, file=process.stdin, flush=True)


def answer(process: Process) -> str:
    """The next line that a process says. Raises RuntimeError where it has ended."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a peer ended; the logs in {ROOT / '.bench'} tell why")
    return line.strip()
