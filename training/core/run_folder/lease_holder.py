"""The process that writes to a run folder, described so that it can be told from every other process anywhere."""

import json
import os
import secrets
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from datapipe.core.bounds.text_trees import parse_record

PROC = Path("/proc")
SHOWN = 120
"""Characters of a command that messages show."""


def boottime() -> float:
    """Seconds since this machine was started, those in suspension included; the same for all of its processes."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease, as it describes itself."""

    token: str
    """Drawn anew for each claim."""
    host: str
    pid: int
    started: str
    """When the process was started, in the kernel's ticks since boot: pids are used again. Empty: unknown."""
    boot: str
    """Id of the start of the machine, shared by its containers. Empty: unknown."""
    namespaces: str
    """Those that pids and the clock are counted in: containers of one machine have the same boot, other pids."""
    place: str
    """The folder itself: a copy of it is another place."""
    command: str
    since: float
    """Seconds since 1970, for messages alone."""
    claimed_s: float
    """`boottime` of the claim."""
    duration_s: float
    """Seconds without a renewal after which others may take over."""
    has_workers: bool
    """Do other processes write on its behalf?"""

    @classmethod
    def here(cls, place: str, *, duration_s: float, has_workers: bool) -> "Holder":
        """This process."""
        own = _proc_is_ours()
        return cls(
            token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(),
            started=_started(os.getpid()) if own else "", boot=_read("sys/kernel/random/boot_id") if own else "",
            namespaces=f"{_link('self/ns/pid')} {_link('self/ns/time')}", place=place, command=_command(),
            since=time.time(), claimed_s=boottime(), duration_s=duration_s, has_workers=has_workers,
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, content: bytes) -> "Holder | None":
        """The inverse of `to_bytes`; None for what is no such content."""
        try:
            return cls(**parse_record(content))
        except (ValueError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def is_beside(self, other: "Holder") -> bool:
        """Can each of the two see the other's process, and do they mean the same folder? False also where it is not
        certain."""
        facts = [(one.host, one.boot, one.namespaces, one.place) for one in (self, other)]
        return facts[0] == facts[1] and all(facts[0])

    def lives(self) -> bool:
        """Is the process there? Asked on its own machine; one that is stopped is there."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        started = _started(self.pid)  # empty for a process that only root may look at
        return not started or started == self.started

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} ({self.command}), since {since}"


def _proc_is_ours() -> bool:
    """Does /proc count processes as this one does?"""
    return _link("self") == str(os.getpid())


def _started(pid: int) -> str:
    """Field 22 of /proc/PID/stat; "ended" for a process that only waits to be noticed; empty where it is not told."""
    fields = _read(f"{pid}/stat").rpartition(")")[2].split()  # the name before may hold anything
    if not fields:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _command() -> str:
    words = list(sys.orig_argv) or [sys.executable]
    words[0] = os.path.basename(words[0])
    line = shlex.join(words)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _read(name: str) -> str:
    try:
        return (PROC / name).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(name: str) -> str:
    try:
        return os.readlink(PROC / name)
    except OSError:
        return ""
