"""What a command makes right in the process that it finds itself in, before it begins: every start is through here."""

import contextlib
import linecache
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datapipe.core.errors import ConfigError, StorageError

OPEN_FILES = 65_536
"""Files that a process may have open at a time, where the system's hard limit allows so many. Shells allow 1,024, which
the readers of many shards and Ray exceed."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
DIRECT = ("localhost", "127.0.0.1", "::1", "169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Hosts that no proxy can reach in our place: this machine, and the clouds' services for credentials and notices."""

_NO_NUMBER = re.compile(r"(?:invalid literal for int\(\).*|could not convert string to float): (['\"])(.*)\1")
"""What Python says of a text that is no number."""
_NAMED = re.compile(r"[Ii]nvalid value for environment variable\W+(\w+)")
"""How PyTorch's C++ names a variable that it cannot read."""
_NUMBERS = re.compile(
    r"OPENCV_(IO_MAX_IMAGE_\w+|IMGCODECS_\w+_MAX_FILE_SIZE|THREAD_POOL_ACTIVE_WAIT_\w+|TRACE_(DEPTH|MAX_CHILDREN)\w*|"
    r"KMEANS_PARALLEL_GRANULARITY|OPENCL_ALIGNMENT_\w+)"
)
"""Variables with which OpenCV ends the process where they are no numbers, as it is loaded."""
_NUMBER = re.compile(r"\d+([KM][Bb]|[km]b)?")
"""How OpenCV reads them."""


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_CONTROL |= {code: f"\\u{code:04x}" for code in (0x061C, *range(0x200E, 0x2010), *range(0x2028, 0x202F),
                                                *range(0x2066, 0x206A))}  # fmt: skip
"""What a terminal would act on: control characters of both sets, other ends of lines, and turns of the direction of
writing, which make a name look like another one."""


def shown(text: str) -> str:
    """A text as it may go to a terminal, or into a log that is looked at there: control characters as \\xNN."""
    return text if text.isascii() and text.isprintable() else text.translate(_CONTROL)


class _ShownStream:
    """Standard output or error as Python's code writes to it, whoever does: names of files may hold anything."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def rich_proxied_file(self) -> Any:
        """Where rich, which asks for this attribute, draws its bars; what these say is shown text already. Below it
        there may be a stream of rich's own, which has that attribute as well."""
        stream = self._stream
        while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = inner
        return stream

    def write(self, text: str) -> int:
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def show_control_characters() -> None:
    """Show control characters of all output as escapes from now on, until the process ends."""
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, _ShownStream) else _ShownStream(stream) for stream in (sys.stdout, sys.stderr)
    )


@contextlib.contextmanager
def control_characters_shown() -> Iterator[None]:
    """The one place that keeps control characters from the terminal: all that is printed, logged or warned of on
    standard output and error comes through here, for as long as the context lasts."""
    before = sys.stdout, sys.stderr
    show_control_characters()
    own = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for name, mine, theirs in zip(("stdout", "stderr"), own, before, strict=True):
            if getattr(sys, name) is mine:
                setattr(sys, name, theirs)


def settle() -> None:
    """Standard input and output that can be used, room for open files, and proxies kept away from this machine."""
    open_standard_files()
    raise_open_files()
    bypass_proxies()


def open_standard_files() -> None:
    """Give a process that was started with closed ones (`>&-`) an input and outputs that lead nowhere: the next files
    opened would take their numbers, and what libraries print would be written into them. What the terminal's encoding
    lacks is printed as \\xNN, in place of an error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def raise_open_files() -> None:
    """Use what the hard limit allows, up to OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bypass_proxies(*hosts: str) -> None:
    """Where proxies are set in the environment, have DIRECT and these hosts reached without them, by this process and
    those that it starts."""
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if given.strip() == "*":
        return
    before = [host.strip() for host in given.split(",") if host.strip()]
    listed = ",".join([*before, *(host for host in (*DIRECT, *hosts) if host not in before)])
    os.environ |= {"no_proxy": listed, "NO_PROXY": listed}


def refuse_other_text(words: Sequence[str]) -> None:
    """Raises ConfigError for words of the command line, and for a working directory, that are no UTF-8: manifests,
    recipes and tables are, and hold the names of the folders that they are about."""
    try:
        folder = os.getcwd()
    except OSError as error:
        raise StorageError(
            f"the working directory cannot be used: {error.strerror}",
            where=os.environ.get("PWD", ""),
            hint="it was deleted or replaced: cd to one that is there",
        ) from error
    for word in (*words, folder):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise _other_text(os.fsencode(word)) from error


def _other_text(word: bytes) -> ConfigError:
    try:
        return ConfigError(f"names are read as {sys.getfilesystemencoding()} here, and this one is UTF-8",
                           where=word.decode(), hint="LC_ALL=C.UTF-8, or PYTHONUTF8=1")  # fmt: skip
    except UnicodeDecodeError:
        return ConfigError(
            "a name that is not UTF-8 text, as archives packed on Windows leave them",
            where=word.decode("utf-8", "backslashreplace"),
            hint="rename it (convmv -f gbk -t utf8 does so), or make a symbolic link to it with another name",
        )


def refuse_fatal_numbers() -> None:
    """Raises ConfigError for variables of the environment that are to be numbers, and which a library would end the
    process for without an error that could be caught."""
    wrong = [name for name, value in os.environ.items() if _NUMBERS.fullmatch(name) and not _NUMBER.fullmatch(value)]
    if wrong:
        raise unread(wrong, ValueError("OpenCV would end the process"))


@contextlib.contextmanager
def numbers_in_environment() -> Iterator[None]:
    """Raises ConfigError where a library fails for a variable of the environment that it reads as a number."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        names = misread(error)
        if not names:
            raise
        raise unread(names, error) from error


def misread(error: BaseException) -> list[str]:
    """The variables of the environment that an error may come from: whose value a library took for a number, or that
    it names itself. Empty where it comes from something else."""
    cause: BaseException | None = error
    while cause is not None:
        if (named := _NAMED.search(str(cause))) and named[1] in os.environ:
            return [named[1]]
        if isinstance(cause, ValueError) and (matched := _NO_NUMBER.search(str(cause))):
            return _with_value(matched[2], _last_line(cause))
        cause = cause.__cause__
    return []


def unread(names: Sequence[str], error: BaseException) -> ConfigError:
    """The error for a person."""
    reason = (str(error).splitlines() or [""])[0]
    return ConfigError(f"a library takes a variable of the environment for a number, which it is not ({reason})",
                       where=" or ".join(f"{name}={os.environ.get(name, '')!r}" for name in names),
                       hint=f"unset {' '.join(names)}, or set a number")  # fmt: skip


def _with_value(value: str, line: str) -> list[str]:
    """Variables of this value: those that the failing line of source names, else all, but that an empty value is that
    of too many."""
    alike = [name for name, set_to in os.environ.items() if set_to.strip() == value.strip()]
    named = [name for name in alike if re.search(rf"\b{re.escape(name)}\b", line)]
    return named or (alike if value.strip() else [])


def _last_line(error: BaseException) -> str:
    """The line of source that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
