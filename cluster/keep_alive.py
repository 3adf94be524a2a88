"""The command of a Ray job as it is handed in: a process that starts the driver again where something killed it.

`python -m cluster.keep_alive 3 pretrain recipe.toml` is `python -m cluster pretrain recipe.toml`, started again up to
three times in a row. It imports next to nothing, so that whatever takes the driver (want of memory, a fault in a
library) leaves it alone. Ray's signals for a job reach the driver without it: it only learns that an end is wanted.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
KILLED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that end a driver although nobody asked it to stop."""
FIRST_DELAY_S = 2.0
"""Before the first new start, doubled for each that follows at once."""
LASTED_S = 600.0
"""A driver that lasted as long begins a new row."""


def keep(line: Sequence[str], times: int, *, first_delay_s: float = FIRST_DELAY_S) -> int:
    """Run a command, again where a signal of KILLED ended it, at most `times` in a row; its exit code, as a shell has
    it. Nothing is started once this process has been told to stop. Only in the main thread."""
    told: list[int] = []
    for number in STOP:
        signal.signal(number, lambda number, _: told.append(number))
    row = 0
    while True:
        begun = time.monotonic()
        code = subprocess.Popen(line).wait()
        if code >= 0 or -code not in KILLED or told:
            break
        row = 1 if time.monotonic() - begun > LASTED_S else row + 1
        name = signal.Signals(-code).name
        if row > times:
            print(f"the driver was killed by {name} {row} times in a row: giving up", flush=True)
            break
        delay_s = first_delay_s * 2 ** (row - 1)
        print(f"the driver was killed by {name}; started again in {delay_s:.0f} s ({row} of {times})", flush=True)
        end = time.monotonic() + delay_s
        while not told and time.monotonic() < end:
            time.sleep(0.1)
        if told:
            break
    return code if code >= 0 else 128 - code


def main(words: Sequence[str]) -> int:
    """`words`: how often, then those of `python -m cluster`."""
    return keep([sys.executable, "-m", "cluster", *words[1:]], int(words[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
