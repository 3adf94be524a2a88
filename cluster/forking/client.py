"""What stands where an interpreter is called: it has a server (`server.py` beside it) fork a process in its place.

It hands its command line, environment, folder, limits and open files to the server, passes signals on, and ends as the
forked process ends. Killed, it takes that process with it. Wherever there is no server, or it cannot serve, the real
interpreter runs in the place of this process.

This file is run by itself, with -I -S, and imports next to nothing: it has to have begun within hundredths of a second.
"""

import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_NPROC", "RLIMIT_STACK")
OWN = {"_", "SHLVL"}
"""Variables that may differ between processes which one server forks: shells set them."""
RAYLET = "RAY_RAYLET_PID"
"""The variable with the process id of the machine's raylet: a server ends with it."""
NUMBER = 8
"""Bytes of a number in either direction: the length of an order; then a process id, and an exit code."""
TRIES, PAUSE_S = 50, 0.02
"""Attempts to reach a server that another client has just made, and the time between them."""


def main(real: str, words: "list[str]") -> None:
    """Run `real` with the words in a forked process where that can be, else in the place of this one."""
    try:
        server = _reached(real)
    except OSError as error:
        print(f"no process is forked: {error}", file=sys.stderr)
        server = None
    if server is not None:
        code = ended(server, order(real, words))
        if code is not None:
            leave(code)
    os.execv(real, [real, *words])


def address(real: str) -> bytes:
    """Where the server listens that forks processes with this interpreter, environment and folder, for this user and
    job: a name in Linux's abstract namespace, which vanishes with the server."""
    given = {name: value for name, value in os.environ.items() if name not in OWN}
    kept = json.dumps([real, __file__, os.getcwd(), os.readlink("/proc/self/ns/pid"), sorted(given.items())])
    return b"\0reid_fork_%d_%s" % (os.getuid(), hashlib.sha256(kept.encode()).hexdigest()[:32].encode())


def _reached(real: str) -> "socket.socket | None":
    """A connection to the server, which is started where there is none. None: outside Ray, or it does not listen."""
    if RAYLET not in os.environ:
        return None
    name = address(real)
    for _ in range(TRIES):
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(name)
        except ConnectionRefusedError:
            server.close()
            if not _start(real, name):  # another client does
                time.sleep(PAUSE_S)
            continue
        if same_owner(server):
            return server
        server.close()
        raise PermissionError("a process of another user or container listens where the server does")
    return None


def _start(real: str, name: bytes) -> bool:
    """Start the server. Its socket is made here: whoever has the name is the one that starts it, and all others, who
    come while it imports, wait for it."""
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(name)
    except OSError:
        listening.close()
        return False
    listening.listen(1024)
    listening.set_inheritable(True)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.py")
    files = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    os.posix_spawn(real, [real, script, str(listening.fileno())], os.environ, file_actions=files, setpgroup=0)
    listening.close()
    return True


def same_owner(connection: socket.socket) -> bool:
    """Whether at the other end of a Unix socket is a process of this user, and none that this process cannot see, of
    another container on the same network, where users have the same numbers."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, user = (int.from_bytes(found[start : start + 4], sys.byteorder) for start in (0, 4))
    return pid > 0 and user == os.getuid()


def order(executable: str, words: "list[str]") -> "dict[str, object]":
    """What the forked process takes over, but for open files. `executable`: what it takes for its interpreter."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "words": words, "executable": executable, "environment": dict(os.environ), "folder": os.getcwd(),
        "ignored": [int(number) for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN],
        "group": os.getpgid(0), "leads": os.getsid(0) == os.getpid(), "client": os.getpid(), "mask": mask,
        "cores": sorted(os.sched_getaffinity(0)), "unbuffered": "PYTHONUNBUFFERED" in os.environ,
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
    }  # fmt: skip


def ended(server: socket.socket, order: "dict[str, object]") -> "int | None":
    """Have the order carried out. The exit code, negative for the number of a signal; None where nothing was forked."""
    files = _open_files(server.fileno())
    early: list[int] = []
    forwarded = set(FORWARDED) - set(order["ignored"])  # type: ignore[call-overload]
    before = {number: signal.signal(number, lambda number, _: early.append(number)) for number in forwarded}
    text = json.dumps({**order, "files": files}).encode()
    try:
        socket.send_fds(server, [len(text).to_bytes(NUMBER, "big")], files)
        server.sendall(text)
        pid = number_from(server)
    except OSError:
        pid = None
    if not pid:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in early:
            os.kill(os.getpid(), number)
        return None
    for file in files:
        os.close(file)
    for number in forwarded:
        signal.signal(number, lambda number, _: _send(pid, number))
    for number in early:
        _send(pid, number)
    code = number_from(server)
    return 70 if code is None else code  # the server is gone, and the process with it


def leave(code: int) -> None:
    """End as a process that has ended so."""
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _send(pid: int, number: int) -> None:
    try:  # noqa: SIM105  (contextlib takes longer to import than all of this)
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended


def number_from(connection: socket.socket) -> "int | None":
    """The next number of the other side; None where it has ended."""
    found = b""
    while len(found) < NUMBER:
        more = connection.recv(NUMBER - len(found))
        if not more:
            return None
        found += more
    return int.from_bytes(found, "big", signed=True)


def _open_files(own: int) -> "list[int]":
    """The files that a program started by this process would have."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) != own and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # that of the list itself
    return sorted(found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
