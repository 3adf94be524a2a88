"""The server that forks processes, its imports done: a worker of Ray's then begins after a tenth of a second, where it
would import for five, and the workers of a machine have most of their libraries' memory in common.

`cluster/forking/client.py` starts it, one for each machine and job, as a script with the number of a listening socket;
it imports what a worker needs, which looks at no GPU, and then forks for every client. It ends with the raylet of its
machine, and when it has had nothing to do for a while. A forked process takes over the client's command line,
environment, folder, limits, open files and process group, and goes on as a fresh interpreter would; its parent is this
server.
"""

import atexit
import builtins
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cluster.forking.client import FORWARDED, NUMBER, RAYLET, same_owner

STREAMS = ((0, "stdin", "r", "surrogateescape"), (1, "stdout", "w", "surrogateescape"),
           (2, "stderr", "w", "backslashreplace"))  # fmt: skip
SLOW_S = 60
"""For a client to send what it has begun to send."""
HIGH = 500
"""Descriptors that arrive are kept above this number until they get their own."""
MOST_FILES = 250
"""Open files that a client can hand over: what the kernel lets through in one message."""
LOAD = "REID_FORK_LOAD"
"""The variable with the function that imports what the forked processes need ("package.module.function")."""
TITLE = "reid::FORKSERVER"
"""What a server is called once its imports are done; the process id of its machine's raylet follows."""
IDLE_S = 60.0
"""Seconds without a process that it has forked, after which a server ends."""


class Server:
    """Listens, forks, and tells clients how their processes end."""

    def __init__(self, listening: socket.socket, ends: Any, idle_s: float | None = None) -> None:
        """`ends`: a file that can be read when the server is to end. `idle_s`: it ends, too, when it has had no process
        for so many seconds; None: it does not."""
        self._listening, self._ends, self._idle_s = listening, ends, idle_s
        self._clients: dict[int, tuple[socket.socket, int]] = {}
        """Forked process -> (connection, process id of the client)."""

    def serve(self) -> dict[str, Any]:
        """Returns in a forked process alone, with the order that it shall carry out."""
        ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            for file in (self._listening, ended, self._ends):
                selector.register(file, selectors.EVENT_READ)
            while True:
                ready = selector.select(None if self._clients else self._idle_s)
                if not ready and not self._clients:
                    os._exit(0)
                for key, _ in ready:
                    if key.fileobj is self._ends:
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
            head, files, *_ = socket.recv_fds(connection, NUMBER, MOST_FILES)
            if head == bytes(NUMBER):
                connection.sendall(json.dumps({client: pid for pid, (_, client) in self._clients.items()}).encode())
            text = _exactly(connection, int.from_bytes(head, "big")) if same_owner(connection) else b""
        except OSError:
            text = b""
        pid = -1
        if text:
            order = json.loads(text)
            pid = os.fork()
            if not pid:
                selector.close()
                self._forget()
                connection.close()
                return {**order, "received": files}
        for file in files:
            os.close(file)
        if pid < 0:  # answered, or the client was killed meanwhile
            connection.close()
            return None
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
            if pid not in self._clients:  # another child of the server's
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
        connection.sendall(number.to_bytes(NUMBER, "big", signed=True))


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
    os.umask(order["mask"])
    os.sched_setaffinity(0, order["cores"])
    for name, limits in order["limits"].items():
        with contextlib.suppress(OSError, ValueError):  # above what the server may have
            resource.setrlimit(getattr(resource, name), tuple(limits))
    _take_files(order["files"], order["received"])
    os.environ.clear()
    os.environ.update(order["environment"])
    _streams(order["unbuffered"])
    _draw_anew()
    words = order["words"]
    sys.executable = order["executable"]
    sys.orig_argv = [sys.executable, *words]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
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
    _close_all_but({HIGH + place for place in range(len(received))})
    for place, number in enumerate(numbers):
        os.dup2(HIGH + place, number, inheritable=True)
        os.close(HIGH + place)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(name))


def _draw_anew() -> None:
    """Random numbers of NumPy, which would be those of every forked process; Python sees to its own."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


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


def _serve(number: int) -> NoReturn:
    """Serve at the listening socket of this number."""
    _close_all_but({0, 1, 2, number})
    os.set_inheritable(number, False)
    raylet = os.pidfd_open(int(os.environ[RAYLET]))  # from here on no other process can have its number
    listening = socket.socket(fileno=number)
    try:
        module, _, load = os.environ[LOAD].rpartition(".")
        getattr(importlib.import_module(module), load)()
        from cluster.core.ray_internals import entitle

        entitle(f"{TITLE} {os.environ[RAYLET]}")
        fit = threading.active_count() == 1  # a forked process would have no others
    except Exception:  # noqa: BLE001  (what fails here fails in the worker again, which tells it)
        fit = False
    if not fit:
        _refuse(listening, raylet)
    gc.collect()
    gc.freeze()  # what is there stays: collections in forked processes need not copy its pages
    end(become(Server(listening, raylet, IDLE_S).serve()))


def _refuse(listening: socket.socket, raylet: int) -> NoReturn:
    """Send clients away, whose processes then start by themselves: at once, where each would else have a server try."""
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(raylet, selectors.EVENT_READ)
        while {key.fileobj for key, _ in selector.select(IDLE_S)} == {listening}:
            listening.accept()[0].close()
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
