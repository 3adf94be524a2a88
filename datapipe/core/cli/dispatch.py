"""How each of the three command lines begins and ends: first words, signals, `--debug`, one clear message, exit codes.

Imports next to nothing: what a command needs is loaded when it is called, after its first words and with signals heard.
"""

import dataclasses
import difflib
import importlib
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from datapipe.core import stop_signals
from datapipe.core.cli.flags import Flag, flags_of, read
from datapipe.core.cli.usage import COLUMNS, Page, short, text, wants_help
from datapipe.core.errors import ConfigError, DataError, StorageError, UsageError, UserError, refusal
from datapipe.core.process_setup import (
    control_characters_shown,
    misread,
    refuse_fatal_numbers,
    refuse_other_text,
    settle,
    unread,
)
from datapipe.core.stop_signals import COMPLETE, FAILED, INTERRUPTED, USAGE

DISTRIBUTION = "reid-pretraining"
OWN = ("datapipe", "training", "cluster")
T = TypeVar("T")
SILENCE_S = 0.7
"""Seconds after which a command that has not ended says that it is at work, where nothing was said at its start."""


class Command:
    """A command that is loaded when it is called, with its first words before that."""

    def __init__(
        self, place: str, about: str, *, loads: str = "", log: bool = False, quiet: Sequence[str] = ()
    ) -> None:
        """`place`: "package.module:function". `about`: the line that `--help` has. `loads`: what takes seconds to load;
        empty: nothing does, and the first words come after SILENCE_S, if the command has not ended by then. `log`:
        standard output is for a person who watches; else, and with any of the flags `quiet`, it is a result, for
        programs too, and first words go to standard error."""
        self.place, self.__doc__, self.loads, self.log, self.quiet = place, about, loads, log, quiet

    def __call__(self, arguments: list[str]) -> int:
        module, _, function = self.place.partition(":")
        return int(getattr(importlib.import_module(module), function)(arguments))

    def announce(self, name: str, arguments: Sequence[str]) -> None:
        """Say that it starts, unless help is all that is wanted."""
        if not arguments or wants_help(arguments):
            return
        if self.loads:
            result = not self.log or any(word in self.quiet for word in arguments)
            print(f"{name}: starting, loads {self.loads}", file=sys.stderr if result else sys.stdout, flush=True)
        elif _alone:
            timer = threading.Timer(SILENCE_S, stop_signals.write_line, args=(f"{name}: at work",))
            timer.daemon = True
            timer.start()


_alone = False
"""Is this process here for the command alone?"""


def run(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and turn its end into an exit code.

    A `UserError` is printed as what, where and what to try; `--debug` anywhere on the line (or DEBUG=1 in the
    environment) shows the stack trace as well. So is what the operating system refuses, wherever that happens, and a
    variable of the environment that a library cannot read as a number. A signal ends the process at once, with one
    line, unless the command has taken it over (`stopping`). Without `arguments` the process is taken to end with the
    command.
    """
    global _alone
    _alone = arguments is None
    settle()
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in line or os.environ.get("DEBUG") == "1"
    with control_characters_shown(), stop_signals.listening() as listener:
        code = _called(main, [word for word in line if word != "--debug"], listener, debug=debug)
    if _alone:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no trace out of the interpreter's own end
    return code


def _called(
    main: Callable[[list[str]], int], line: list[str], listener: stop_signals.Listener | None, *, debug: bool
) -> int:
    try:
        refuse_other_text(line)
        refuse_fatal_numbers()
        code = main(line)
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        return _failed(error)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        if listener is None or listener.received is None:  # raised by somebody else, or not in the main thread
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
            return INTERRUPTED
        listener.speak(listener.received)
        if _alone:
            stop_signals.kill_children()
        return stop_signals.exit_code(listener.received)
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        sys.stderr.close()
        return FAILED
    except OSError as error:
        if debug or error.errno is None:
            raise
        _drop_unprinted()
        return _failed(refusal(error))
    except (ValueError, RuntimeError) as error:
        names = misread(error)
        if debug or not names:
            raise
        return _failed(unread(names, error))


def _failed(error: UserError) -> int:
    near = _nearest_path(error.where) if isinstance(error, DataError | StorageError) else ""
    if near and near not in error.hint:
        error = type(error)(error.what, where=error.where, hint=f"did you mean `{near}`? {error.hint}".rstrip())
    print(f"error: {error}", file=sys.stderr, flush=True)
    return USAGE if isinstance(error, UsageError) else FAILED


def _nearest_path(path: str) -> str:
    """What a path that is not there may mean: the first of its parts that is not there, by the most similar name beside
    it, and the rest as it is. Empty: it is there, is no local path, or nothing is similar."""
    if not path or "://" in path or path.startswith("-"):
        return ""
    parts = Path(path).parts
    for end in range(1, len(parts) + 1):
        part = Path(*parts[:end])
        try:
            if part.exists():
                continue
            beside = [one.name for one in part.parent.iterdir()]
        except OSError:
            return ""
        near = difflib.get_close_matches(part.name, beside, n=1, cutoff=0.7)
        return str(part.with_name(near[0]).joinpath(*parts[end:])) if near else ""
    return ""


def _drop_unprinted() -> None:
    """Python prints it when it ends, and where that fails it says so with a trace."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(commands: Mapping[str, Callable[[list[str]], int]], arguments: Sequence[str], *, prog: str,
             extra: str = "") -> int:  # fmt: skip
    """Call the command that the first word names with the rest of the line; `--help` lists them all, `--version`
    prints ours. `extra`: the extra of our distribution that installs what the commands import; empty: the distribution
    alone does. Raises ConfigError where a library is not installed."""
    if arguments and arguments[0] in commands:
        chosen, rest = commands[arguments[0]], list(arguments[1:])
        if isinstance(chosen, Command):
            chosen.announce(arguments[0], rest)
        try:
            return chosen(rest)
        except ModuleNotFoundError as error:
            absent = (error.name or "").partition(".")[0]
            if absent in OWN:
                raise
            wanted = f"[{extra}]" if extra else ""
            raise ConfigError(f"`{prog} {arguments[0]}` needs `{absent}`, which is not installed",
                              hint=f"pip install '{DISTRIBUTION}{wanted}', or in a clone: pip install '.{wanted}'"
                              ) from error  # fmt: skip
    width = max(map(len, commands))
    lines = [f"usage: {prog} COMMAND [--debug] ...", ""]
    for name, call in commands.items():
        lines += textwrap.wrap((call.__doc__ or "").splitlines()[0], COLUMNS,
                               initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))  # fmt: skip
    page = "\n".join([*lines, "", f"`{prog} COMMAND --help` says more."])
    if not arguments:
        print(page, file=sys.stderr)
        return USAGE
    if wants_help(arguments[:1]):
        print(page)
        return COMPLETE
    if arguments[0] == "--version":
        print(f"{DISTRIBUTION} {version()}")
        return COMPLETE
    near = difflib.get_close_matches(arguments[0], list(commands), n=1)
    raise UsageError(f"no command `{arguments[0]}`" + (f"; did you mean `{near[0]}`?" if near else ""), where=prog,
                     hint=f"one of {', '.join(commands)}; `{prog} --help` says what they do")  # fmt: skip


def version() -> str:
    """The version of the installed distribution; "unknown" where it runs from a copy of its files."""
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def parse(kind: type[T], words: Sequence[str], page: Page) -> T:
    """The command line as settings. Help, and usage where no word is given and one is wanted, end the process."""
    show_help(flags_of(kind), words, page)
    return read(kind, words, prog=page.prog)


def show_help(known: Sequence[Flag], words: Sequence[str], page: Page) -> None:
    """Print the help that the line asks for, or usage where it is empty and must not be; raises SystemExit then."""
    if wants_help(words):
        print(text(page, known, words))
        raise SystemExit(COMPLETE)
    if not words and any(flag.default is dataclasses.MISSING for flag in known):
        print(short(page, known), file=sys.stderr)
        raise SystemExit(USAGE)
