"""A Python for tests that has its slow imports behind it: the client, which stands where an interpreter is called.

It is that of `cluster/forking`, for other programs than Ray's workers. What a forked process cannot stand for (other
options of Python, variables that are read while Python or torch starts) is run by the real interpreter, in the place
of this process.
"""

import json
import os
import socket
import sys

from cluster.forking import client

READ_AT_START = ("LD_PRELOAD", "PYTHON", "ATEN_", "CUDA_VISIBLE_DEVICES", "DEEPSPEED_", "DS_", "MKL_", "NULL_", "OMP_",
                 "TORCH_LOGS")  # fmt: skip
"""Beginnings of the names of variables that a process obeys while it starts or imports."""
READ_BY_SITE = ("sitecustomize.py", "usercustomize.py")
"""Modules of a folder of PYTHONPATH that Python imports while it starts."""
LET_PASS = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONBREAKPOINT"}
"""Names that begin so: the server sees to them, or nothing of a test depends on them."""

WITH_RAY, READ_BY_RAY = ".ray", ".read_by_ray"
"""What is added to the address: for the server that has imported Ray, and for the file with the names of the variables
that Ray has read meanwhile."""
AS_UNSET = {("RAY_CLIENT_MODE", "0"), ("RAY_DEDUP_LOGS", "1")}
"""Values that a process has by itself, once Ray has been imported or is about to be."""
NO_MATTER = {"COLUMNS", "LINES", "HOME", "XDG_CACHE_HOME"}
"""Variables that Ray and what it imports read, and nothing hangs on: pytest sets the first two in some processes; the
others say where matplotlib keeps fonts, and where Ray Train puts results unless it is told."""
READ_LATER = (
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_LD_PRELOAD_ON_WORKERS", "RAY_NODE_ID", "RAY_RAYLET_PID", "RAY_TMPDIR", "RAY_TRAIN_",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
)  # fmt: skip
"""Beginnings of the names of Ray's variables that are not among the settings which its library reads when it is
loaded. A worker's own, RAY_JOB_ID, is; RAY_RAYLET_PID is, too, but only a worker obeys it."""
LAUNCHER = "/workers/setup_worker.py"
"""Hands its environment on to a worker, and is none."""

ALLOCATOR = "/ray/core/libjemalloc.so"
"""What Ray preloads into its own processes; they do as well without."""


def main(real: str, address: str, served: "dict[str, str]") -> None:
    """`real`: the interpreter; `address`: the server's socket; `served`: the server's own environment."""
    words = sys.argv[2:]  # after the name by which this was called
    while words[:1] == ["-u"]:
        words = words[1:]
    apart = "its options" if not _understood(words) else _apart(served)
    if apart:
        with open(address + ".cold", "a") as file:
            file.write(apart + "\n")
        os.execv(real, [real, *sys.argv[2:]])
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address + WITH_RAY if _ray_as_served(address, served, words) else address)
    except OSError:
        os.execv(real, [real, *sys.argv[2:]])
    order = client.order(sys.argv[1], words)
    order["path"] = _path(os.environ.get("PYTHONPATH", "")) if _added(served["PYTHONPATH"]) else []
    order["unbuffered"] = sys.argv[2:3] == ["-u"] or order["unbuffered"]
    code = client.ended(server, order)
    if code is None:
        os.execv(real, [real, *sys.argv[2:]])
    client.leave(code)


def _understood(words: "list[str]") -> bool:
    return len(words) > 1 and words[0] in ("-m", "-c") or words[:1] != [] and words[0].endswith(".py")


def _apart(served: "dict[str, str]") -> str:
    """The variable for which this process would not start or import as the server did; empty: there is none."""
    added = _added(served["PYTHONPATH"])
    if any(os.path.exists(os.path.join(folder, name)) for folder in added for name in READ_BY_SITE):
        return "PYTHONPATH"
    names = {name for name in (*os.environ, *served) if name.startswith(READ_AT_START)} - LET_PASS
    changed = [name for name in sorted(names) if os.environ.get(name, "") != served.get(name, "")]
    if os.environ.get("LD_PRELOAD", "").endswith(ALLOCATOR):
        changed.remove("LD_PRELOAD")
    return changed[0] if changed else ""


def _ray_as_served(address: str, served: "dict[str, str]", words: "list[str]") -> bool:
    """Would Ray be imported here as it was by the server that has it?"""
    try:
        with open(address + READ_BY_RAY) as file:
            names = json.load(file)
    except OSError:
        return False  # it is under way
    own = {name: value for name, value in os.environ.items() if (name, value) not in AS_UNSET}
    if words[0].endswith(LAUNCHER):
        own.pop("RAY_JOB_ID", None)
    names = [name for name in names if name not in NO_MATTER]
    names += [name for name in (*own, *served) if name.startswith("RAY_") and not name.startswith(READ_LATER)]
    return all(own.get(name, "") == served.get(name, "") for name in names)


def _added(served: str) -> "list[str]":
    """The folders that are searched here and not by the server, in order."""
    return [folder for folder in _path(os.environ.get("PYTHONPATH", "")) if folder not in _path(served)]


def _path(variable: str) -> "list[str]":
    return [folder for folder in variable.split(os.pathsep) if folder]
