"""A Python for tests that has its slow imports behind it: the server, which forks for every client (`warm_client`).

`python -m tests.support.warm_server SOCKET`: ends when its standard input does. A forked process takes over the
client's command line, environment, folder, open files and process group, and goes on as a fresh interpreter would; its
parent is this server. A client that is killed takes its forked process with it. A connection that sends 8 bytes of
zero is told which client has which process.

There are two of them, the second with Ray imported: for clients with the same values of all variables that Ray reads
while it is imported.
"""

import atexit
import builtins
import contextlib
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy

from tests.support.warm_client import FORWARDED, READ_BY_RAY, WITH_RAY

STREAMS = ((0, "stdin", "r", "surrogateescape"), (1, "stdout", "w", "surrogateescape"),
           (2, "stderr", "w", "backslashreplace"))  # fmt: skip
OURS = {"cluster", "datapipe", "tests", "training"}
"""Packages of this project."""
OWN_PATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
SLOW_S = 60
"""For a client to send what it has begun to send."""
HIGH = 500
"""Descriptors that arrive are kept above this number until they get their own."""


class Server:
    """Listens, forks, and tells clients how their processes end."""

    def __init__(self, address: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(address)
        self._listening.listen(128)
        self._clients: dict[int, tuple[socket.socket, int]] = {}
        """Forked process -> (connection, process id of the client)."""

    def serve(self) -> dict[str, Any]:
        """Returns in a forked process alone, with the order that it shall carry out."""
        ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            for file in (self._listening, ended, sys.stdin):
                selector.register(file, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is sys.stdin:
                        os._exit(0)
                    elif key.fileobj is self._listening:
                        connection, _ = self._listening.accept()
                        if order := self._accept(connection, selector):
                            os.close(ended)
                            os.close(wake)
                            return order
                    elif key.fileobj == ended:
                        os.read(ended, 1000)
                        self._reap(selector)
                    else:
                        self._lost(key.fileobj, selector)

    def _accept(self, connection: socket.socket, selector: selectors.BaseSelector) -> dict[str, Any] | None:
        connection.settimeout(SLOW_S)
        files: list[int] = []
        try:
            head, files, *_ = socket.recv_fds(connection, 8, 250)
            if head == bytes(8):
                connection.sendall(json.dumps({client: pid for pid, (_, client) in self._clients.items()}).encode())
            text = _exactly(connection, int.from_bytes(head, "big"))
        except OSError:
            text = b""
        if not text:  # answered, or the client was killed meanwhile
            for file in files:
                os.close(file)
            connection.close()
            return None
        order = json.loads(text)
        pid = os.fork()
        if not pid:
            selector.close()
            self._forget()
            connection.close()
            return {**order, "received": files}
        for file in files:
            os.close(file)
        self._clients[pid] = (connection, order["client"])
        selector.register(connection, selectors.EVENT_READ)
        _tell(connection, pid)
        return None

    def close(self) -> None:
        """No client comes here."""
        self._listening.close()

    def _forget(self) -> None:
        self.close()
        for connection, _ in self._clients.values():
            connection.close()

    def _reap(self, selector: selectors.BaseSelector) -> None:
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid not in self._clients:  # the server with Ray: whoever asks it meets that
                continue
            connection, _ = self._clients.pop(pid)
            _tell(connection, os.waitstatus_to_exitcode(status))
            with contextlib.suppress(KeyError):  # killed before: see `_lost`
                selector.unregister(connection)
            connection.close()

    def _lost(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """A client was killed; or its process has ended since the look."""
        pid = next((pid for pid, (own, _) in self._clients.items() if own is connection), None)
        if pid is not None:
            selector.unregister(connection)
            os.kill(pid, signal.SIGKILL)  # not reaped yet: it is this process, or ends already


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes; none where the other side ends before."""
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            return b""
        found += more
    return found


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # killed meanwhile: that is noticed by itself
        connection.sendall(number.to_bytes(8, "big", signed=True))


def become(order: dict[str, Any]) -> Callable[[], Any]:
    """Take over all that the client had. Returns what is to be run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in FORWARDED:  # as the client has them: of the server's own some may be ignored
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order["ignored"] else usual)
    if order["leads"]:
        os.setsid()
    else:
        with contextlib.suppress(OSError):  # a group of another session
            os.setpgid(0, order["group"])
    os.chdir(order["folder"])
    _take_files(order["files"], order["received"])
    os.environ.clear()
    os.environ.update(order["environment"])
    _streams(order["unbuffered"])
    if order["path"]:
        _search(order["path"])
    words = order["words"]
    sys.executable = order["executable"]
    sys.orig_argv = [sys.executable, *words]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    numpy.random.seed()
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path[0] = order["folder"]
        return lambda: runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        return lambda: exec(compile(words[1], "<string>", "exec"), main.__dict__)
    sys.argv = words
    sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
    main.__dict__["__file__"] = words[0]
    return lambda: exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


def end(run: Callable[[], Any]) -> NoReturn:
    """Run it and end as Python does, but leave it to the kernel to free the memory, which is the server's."""
    code, by = 0, 0
    try:
        run()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        if code == 1 and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
    except BaseException as error:
        code, by = 1, signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if by:
        signal.signal(by, signal.SIG_DFL)
        os.kill(os.getpid(), by)
    os._exit(code & 0xFF)


def _take_files(numbers: list[int], received: list[int]) -> None:
    """The client's files under the client's numbers; none of the server's."""
    for place, file in enumerate(received):
        os.dup2(file, HIGH + place, inheritable=False)
    kept = {HIGH + place for place in range(len(received))}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(name))
    for place, number in enumerate(numbers):
        os.dup2(HIGH + place, number, inheritable=True)
        os.close(HIGH + place)


def _search(folders: list[str]) -> None:
    """As with these folders in PYTHONPATH. What is ours is imported anew, as one of them may hold a copy of it."""
    sys.path[1:] = dict.fromkeys((*folders, *(folder for folder in sys.path[1:] if folder not in OWN_PATH)))
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _streams(unbuffered: bool) -> None:
    """Python's three standard streams on the new files, as at its start."""
    for number, name, mode, errors in STREAMS:
        stream = None
        with contextlib.suppress(OSError):  # one that is closed
            file = open(number, mode + "b", 0 if unbuffered and mode == "w" else -1, closefd=False)  # noqa: SIM115
            stream = io.TextIOWrapper(file, encoding="utf-8", errors=errors, write_through=unbuffered,
                                      line_buffering=mode == "w" and (number == 2 or os.isatty(number)))  # fmt: skip
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


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
    importlib.import_module("tests.support.preloaded_ray")
    os.environ.__class__ = usual
    with contextlib.suppress(FileNotFoundError):  # the run has ended before, and its folder is gone
        Path(notes + ".new").write_text(json.dumps(sorted(_Recorded.asked)))
        os.rename(notes + ".new", notes)


if __name__ == "__main__":
    _servers = Server(sys.argv[1]), Server(sys.argv[1] + WITH_RAY)  # clients may come, and wait, from here on
    print(flush=True)
    importlib.import_module("tests.support.preloaded")
    _server, _other = _servers if os.fork() else reversed(_servers)
    _other.close()
    if _server is _servers[1]:
        _import_ray(sys.argv[1] + READ_BY_RAY)
    end(become(_server.serve()))
