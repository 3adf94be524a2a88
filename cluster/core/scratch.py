"""A folder for Ray's sockets, logs and sessions: with a short path, and one that can be written."""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from datapipe.core.errors import StorageError
from datapipe.core.stop_signals import at_end

MOST_BYTES = 107
"""Longest path of a Unix socket (108 with the zero at its end); macOS allows 103."""
BELOW = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path of a socket that Ray makes below the folder it is given."""
ROOM_BYTES = 32_000_000
"""Ray's logs and sessions of a short run. With less room it stops without saying why."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder, removed afterwards, also where a signal ends the process.

    In the temporary folder (TMPDIR) where that will do, else in another place of this machine. Raises StorageError
    where none will.
    """
    root = _chosen()
    try:
        folder = tempfile.mkdtemp(prefix="reid_", dir=root)
    except OSError as error:
        raise _none({str(root): error.strerror or str(error)}) from error
    try:
        with at_end(lambda: _remove(folder)):
            yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Processes that are being killed may still write there for a moment."""
    for pause_s in (0.0, 0.1, 0.3, 0.6, 1.0):
        time.sleep(pause_s)
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return


def _chosen() -> Path:
    refused: dict[str, str] = {}
    for root in places():
        try:
            problem = unfit(root)
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return root
        refused[str(root)] = problem
    raise _none(refused)


def places() -> list[Path]:
    """Where the folder may lie, the best first."""
    with contextlib.suppress(FileNotFoundError):  # "no usable temporary directory": one of the others may do
        tempfile.gettempdir()
    wanted = (os.environ.get("RAY_TMPDIR"), tempfile.tempdir, "/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/var/tmp",
              "/dev/shm", os.path.expanduser("~"))  # fmt: skip
    return list(dict.fromkeys(Path(place) for place in wanted if place and os.path.isabs(place)))


def unfit(root: Path) -> str:
    """Why Ray cannot work below it; empty: it can. Raises OSError where it cannot be written."""
    if len(os.fsencode(root / "reid_12345678" / BELOW)) > MOST_BYTES:
        return "its path is too long for the sockets of Ray"
    if shutil.disk_usage(root).free < ROOM_BYTES:
        return f"less than {ROOM_BYTES / 1e6:.0f} MB are free"
    path = root / f"reid_{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as probe:  # some shared file systems have no sockets
        try:
            probe.bind(str(path))
        finally:
            path.unlink(missing_ok=True)
    return ""


def _none(refused: dict[str, str]) -> StorageError:
    return StorageError(
        "there is no temporary folder in which Ray can work",
        where="; ".join(f"{place}: {problem}" for place, problem in refused.items()),
        hint="TMPDIR=/tmp, or another folder with a short path, free space and rights to write",
    )
