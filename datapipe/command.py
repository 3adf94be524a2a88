"""How each of the three command lines begins and ends: `--debug`, one clear message, an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from datapipe.errors import UserError

COMPLETE, FAILED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes. 75: stopped by SIGTERM and resumable; 130: stopped by Ctrl-C. A preempted job never looks finished."""


def run(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and turn its end into an exit code.

    A `UserError` is printed as what, where and what to try; `--debug` anywhere on the line (or DEBUG=1 in the
    environment) shows the stack trace as well.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in line or os.environ.get("DEBUG") == "1"
    line = [word for word in line if word != "--debug"]
    try:
        return main(line)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        if debug:
            raise
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        sys.stderr.close()
        return FAILED
