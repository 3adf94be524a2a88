"""What a process does when it is told to end: by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP. Imports next to nothing.

While a command starts, each of them ends it at once: one line, no process left behind, exit code 130 or 75. Whoever has
something to save or to tidy up takes over with `receiving` or `unwinding`; a second signal ends the process then.

A thread of its own hears of signals, so that they count while the main thread is in foreign code, which neither sees
nor can swallow them: no exception is raised where no one expects one.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

COMPLETE, FAILED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes. 75: stopped by a signal and resumable; 130: stopped by Ctrl-C. A preempted job never looks finished."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE_S = 10.0
"""Seconds for tidying up after a signal, or for a library to let go of it; then the process ends all the same."""
FAREWELL_S = 3.0
"""Seconds for what `at_end` names."""
LOOK_S = 0.002
"""Seconds between looks whether a handler is still ours."""
SIGACTION_BYTES = 256
"""More than the C library's `struct sigaction` has anywhere; it is only compared and put back."""
HALT_S = 0.5
"""Seconds for the main thread to come to its next line, and to do nothing from there on."""
GOES_ON = "; the same command again goes on from here"
"""What the line about the end says where that is so."""

Receiver = Callable[[int], None]


def exit_code(received: int | None) -> int:
    """The exit code of a process that ended because of the signal `received`; None: it ran to its end."""
    if received is None:
        return COMPLETE
    return INTERRUPTED if received == signal.SIGINT else STOPPED


def name_of(number: int) -> str:
    """`Ctrl-C`, `SIGTERM`, ..."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Listener:
    """Takes the signals of this process while it is open. There is one at a time."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that has the main thread end by an exception."""
        self.words = ""
        """What the line about the end says besides the signal."""
        self.raises = False
        """Is a signal to be a KeyboardInterrupt in the main thread?"""
        self.receivers: list[Receiver] = []
        self.firsts: list[Callable[[], object]] = []
        self.ends: list[Callable[[], object]] = []
        self._before: dict[int, object] = {}
        self._raised = self._unwinding = False
        self._spoken, self._ending, self._halted = threading.Lock(), threading.Lock(), threading.Event()

    def open(self) -> None:
        """In the main thread."""
        self._pid = os.getpid()
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        self.take()

    def take(self) -> None:
        """Take the signals (again): libraries that start later put their own handlers in place, those in C++ without
        Python's knowledge. What `nohup` has ignored stays ignored. In the main thread."""
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before == signal.SIG_IGN:
                continue
            signal.signal(number, self._handle)
            if before != self._handle:
                self._before.setdefault(number, before)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)

    def forget(self) -> None:
        """In a forked child, which is told for itself and must not tell its parent."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def speak(self, number: int) -> None:
        """The one line."""
        if self._spoken.acquire(blocking=False):
            write_line(f"stopped by {name_of(number)}{self.words}")

    def end(self, number: int) -> None:
        """Say so and end at once, with all processes that were started."""
        if not self._ending.acquire(blocking=False):
            if threading.current_thread() is threading.main_thread():
                self._halted.set()
            time.sleep(3 * FAREWELL_S)  # another thread is at it, and this one is to do nothing any more
        _call(self.firsts)
        self.speak(number)
        with contextlib.suppress(OSError):  # what others say about this end is noise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        signal.alarm(0)  # some handlers in C++ set one that aborts the process, before they hand on to ours
        main = threading.main_thread()
        if threading.current_thread() is not main and main.ident is not None:
            signal.pthread_kill(main.ident, signal.SIGTERM)  # it is to do nothing more, whoever receives signals
            self._halted.wait(HALT_S)  # what it is starting has been started by then
        children = stop_children()
        _call(self.ends)
        if late := stop_children() - children:  # by foreign code that it did not come out of
            children |= late
            _call(self.ends)
        for pid in children:  # at the very last: Ray's library ends this process, too, once its daemons are gone
            _send(pid, signal.SIGKILL)
        os._exit(exit_code(number))

    def _handle(self, number: int, _: FrameType | None) -> None:
        """In the main thread, sooner or later."""
        if signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False) != self._writer:
            self._receive(number)  # somebody took the descriptor away, and the thread has not heard
        if not self.receivers or self._ending.locked():
            self.end(number)  # before anything else is done here
        if self.raises:
            self.received = self.received or number
            self.speak(self.received)  # while its words are still those of this work
            self.interrupt()

    def interrupt(self) -> None:
        """Once, if the process is to be unwound."""
        if self.received is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._receive(number)
        os.close(reader)

    def _receive(self, number: int) -> None:
        if number == signal.SIGHUP:
            leave_dead_terminal()
        if self.receivers:
            self.receivers[-1](number)
        else:
            self.end(number)

    def unwind(self, number: int) -> None:
        """The main thread ends by an exception, and not too late."""
        if self._unwinding:
            self.end(number)  # a second signal
        self._unwinding = True
        self.received = self.received or number
        self.speak(number)
        timer = threading.Timer(GRACE_S, self.end, args=(number,))
        timer.daemon = True
        timer.start()


def _call(functions: list[Callable[[], object]]) -> None:
    """The last one first, all of them in FAREWELL_S at most."""

    def call() -> None:
        for function in reversed(functions):
            with contextlib.suppress(Exception):
                function()

    if functions:
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(FAREWELL_S)


_listener: Listener | None = None


def _after_fork() -> None:
    global _listener
    if _listener is not None:
        _listener.forget()
        _listener = None


os.register_at_fork(after_in_child=_after_fork)


def current() -> Listener | None:
    """The open listener."""
    return _listener


def take_again() -> None:
    """After a library has started that may have taken the signals."""
    if _listener is not None and threading.current_thread() is threading.main_thread():
        _listener.take()


@contextlib.contextmanager
def listening() -> Iterator[Listener | None]:
    """Signals end this process at once, or go to whoever takes them over. None where signals cannot be taken: outside
    the main thread."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield _listener
        return
    _listener = opened = Listener()
    opened.open()
    try:
        yield opened
    finally:
        if _listener is opened:  # not in a forked child
            _listener = None
            opened.close()


@contextlib.contextmanager
def receiving(receiver: Receiver) -> Iterator[None]:
    """Signals go to `receiver(number)`, called from a thread of its own."""
    with listening() as listener:
        if listener is None:
            yield
            return
        listener.receivers.append(receiver)
        try:
            yield
        finally:
            listener.receivers.remove(receiver)


@contextlib.contextmanager
def unwinding(words: str = "") -> Iterator[None]:
    """The first signal is a KeyboardInterrupt in the main thread, so that temporary files go as after an error; where
    that takes longer than GRACE_S the process ends all the same. `words` go into the line that says so."""
    if _listener is None:
        yield
        return
    listener, before = _listener, (_listener.words, _listener.raises)
    with receiving(listener.unwind):
        listener.words, listener.raises = words, True
        try:
            yield
            listener.interrupt()  # what came in the last moment counts, too
        finally:
            listener.words, listener.raises = before


@contextlib.contextmanager
def at_end(function: Callable[[], object], *, first: bool = False) -> Iterator[None]:
    """Should the process end by a signal meanwhile: call this once its children stand still, or `first`, before a word
    is said; it has FAREWELL_S."""
    if _listener is None:
        yield
        return
    functions = _listener.firsts if first else _listener.ends
    functions.append(function)
    try:
        yield
    finally:
        functions.remove(function)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Processes that are started meanwhile do not get Ctrl-C, SIGUSR1 and SIGHUP, which a terminal or a scheduler sends
    to all of them: it is for their parent to end them. The parent itself misses none, as another thread hears it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def keeping(number: int) -> Iterator[None]:
    """While foreign code runs that puts a handler of its own in place, in C++ without Python's knowledge: the one that
    is there now comes back within milliseconds, and not only when that code is done."""
    import ctypes

    action = ctypes.CDLL(None, use_errno=True).sigaction
    ours, theirs = (ctypes.create_string_buffer(SIGACTION_BYTES) for _ in range(2))
    if action(number, None, ours):
        yield  # a platform that has no such thing
        return
    over = threading.Event()

    def keep() -> None:
        while not over.wait(LOOK_S):
            if not action(number, None, theirs) and theirs.raw != ours.raw:
                action(number, ours, None)

    thread = threading.Thread(target=keep, name="keeps a signal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def write_line(text: str) -> None:
    """To stderr, from any thread and whatever the interpreter is at."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def leave_dead_terminal() -> None:
    """Output to a terminal that has hung up is an error, which must not keep a run from saving."""
    import select

    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            silence(descriptor)


def silence(descriptor: int) -> None:
    """What is written to it from now on goes nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def stop_children() -> set[int]:
    """SIGSTOP to every process below this one, and to those that one of them has just started; which they are. Returns
    once they stand still, or after a second: one that waits for a disk does not hear."""
    stopped: set[int] = set()
    while new := _descendants(os.getpid()) - stopped:
        stopped |= new
        for pid in new:
            _send(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 1
    while not all(map(_stands_still, stopped)) and time.monotonic() < deadline:
        time.sleep(0.002)
    return stopped


def _stands_still(pid: int) -> bool:
    """Is the process stopped, or dead?"""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


def kill_children() -> None:
    """SIGKILL to every process below this one. They are all stopped first, so that none starts another one."""
    stopped = stop_children()
    for pid in stopped:
        _send(pid, signal.SIGKILL)
    deadline = time.monotonic() + 1
    while stopped & _descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.01)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _descendants(root: int) -> set[int]:
    """Processes below another one that are not yet dead; none where there is no /proc."""
    if not sys.platform.startswith("linux"):
        return set()
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(name))
    pids: set[int] = set()
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        pids.update(below)
        waiting.extend(below)
    return pids
