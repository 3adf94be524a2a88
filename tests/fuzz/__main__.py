"""python -m tests.fuzz [--rounds 100] [--seed 0] [--readers zip tar] [--kept FOLDER]: a table, exit code 1 for faults.

A round is one changed input for each reader; sound and hostile inputs come first.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

from tests.fuzz.readers import NAMES, WITH_TORCH
from tests.fuzz.rounds import Rounds
from tests.support import warm_python

SHOWN = 5


def main() -> int:
    """All readers, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--kept", type=Path, help="folder for inputs that show a fault")
    given = parser.parse_args()
    failed = total = 0
    print(f"{'reader':<12}{'inputs':>8}{'read':>8}{'refused':>9}{'faults':>8}{'peak MB':>9}{'s':>8}", flush=True)
    warm = warm_python.started() if WITH_TORCH & set(given.readers) else contextlib.nullcontext()
    with warm:
        for name in given.readers:
            began = time.monotonic()
            with Rounds([name], given.seed, given.kept) as rounds:
                rounds.sound()
                rounds.hostile()
                rounds.changed(given.rounds)
                tally = rounds.tallies[name]
            print(f"{name:<12}{tally.inputs:>8,}{tally.good:>8,}{tally.refused:>9,}{len(tally.faults):>8,}"
                  f"{tally.peak_mb:>9,}{time.monotonic() - began:>8.1f}", flush=True)  # fmt: skip
            for fault in tally.faults[:SHOWN]:
                print(f"    {fault}", flush=True)
            failed, total = failed + len(tally.faults), total + tally.inputs
    print(f"{total:,} inputs, {failed:,} faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
