"""How each of the three command lines begins and ends: `--debug`, one clear message, an exit code."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from datapipe.errors import UserError, refusal
from datapipe.surroundings import refuse_other_text, settle

COMPLETE, FAILED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes. 75: stopped by SIGTERM and resumable; 130: stopped by Ctrl-C. A preempted job never looks finished."""


def run(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and turn its end into an exit code.

    A `UserError` is printed as what, where and what to try; `--debug` anywhere on the line (or DEBUG=1 in the
    environment) shows the stack trace as well. So is what the operating system refuses, wherever that happens.
    """
    settle()
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in line or os.environ.get("DEBUG") == "1"
    line = [word for word in line if word != "--debug"]
    try:
        refuse_other_text(line)
        code = main(line)
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        return _failed(error)
    except KeyboardInterrupt:
        if debug:
            raise
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        sys.stderr.close()
        return FAILED
    except OSError as error:
        if debug or error.errno is None:
            raise
        _drop_unprinted()
        return _failed(refusal(error))


def _failed(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return FAILED


def _drop_unprinted() -> None:
    """Python prints it when it ends, and where that fails it says so with a trace."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(commands: Mapping[str, Callable[[list[str]], int]], arguments: Sequence[str], *, prog: str) -> int:
    """Call the command that the first word names with the rest of the line; `--help` lists them all."""
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](list(arguments[1:]))
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {(call.__doc__ or '').splitlines()[0]}" for name, call in commands.items())
    usage = f"usage: {prog} COMMAND [--debug] ...\n{listed}\n`{prog} COMMAND --help` says more."
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage)
        return COMPLETE
    if arguments:
        near = difflib.get_close_matches(arguments[0], list(commands), n=1)
        print(f"error: no command `{arguments[0]}`" + (f"; did you mean `{near[0]}`?" if near else ""), file=sys.stderr)
    print(usage, file=sys.stderr)
    return USAGE
