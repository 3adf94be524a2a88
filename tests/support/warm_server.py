"""A Python for tests that has its slow imports behind it: the server, which forks for every client (`warm_client`).

`python -m tests.support.warm_server SOCKET`: the server of `cluster/forking`, for other programs than Ray's workers;
it ends when its standard input does.

There are two of them, the second with Ray imported: for clients with the same values of all variables that Ray reads
while it is imported.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from cluster.forking.server import Server, become, end
from tests.support.warm_client import READ_BY_RAY, WITH_RAY

OURS = {"cluster", "datapipe", "tests", "training"}
"""Packages of this project."""
OWN_PATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)


def run_as(order: dict[str, Any]) -> NoReturn:
    """In a forked process: be what the client was to be."""
    if order["path"]:
        _search(order["path"])
    end(become(order))


def _search(folders: list[str]) -> None:
    """As with these folders in PYTHONPATH. What is ours is imported anew, as one of them may hold a copy of it."""
    sys.path[1:] = dict.fromkeys((*folders, *(folder for folder in sys.path[1:] if folder not in OWN_PATH)))
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _listening(address: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(address)
    found.listen(128)
    return found


class _Recorded(os._Environ):  # type: ignore[type-arg]
    """`os.environ` that keeps the names that it is asked for."""

    asked: ClassVar[set[str]] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)


def _import_ray(notes: str) -> None:
    """Import Ray and what uses it. Writes the names of the variables that this reads."""
    usual = type(os.environ)
    os.environ.__class__ = _Recorded
    from cluster.core.ray_internals import random_ids_for_forks

    with random_ids_for_forks():
        importlib.import_module("tests.support.preloaded_ray")
    os.environ.__class__ = usual
    with contextlib.suppress(FileNotFoundError):  # the run has ended before, and its folder is gone
        Path(notes + ".new").write_text(json.dumps(sorted(_Recorded.asked)))
        os.rename(notes + ".new", notes)


if __name__ == "__main__":
    # clients may come, and wait, from here on
    _servers = [Server(_listening(sys.argv[1] + name), sys.stdin) for name in ("", WITH_RAY)]
    print(flush=True)
    importlib.import_module("tests.support.preloaded")
    _server, _other = _servers if os.fork() else reversed(_servers)
    _other.close()
    if _server is _servers[1]:
        _import_ray(sys.argv[1] + READ_BY_RAY)
    run_as(_server.serve())
