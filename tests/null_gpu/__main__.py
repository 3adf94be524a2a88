"""`python -m tests.null_gpu MODULE ...`: `python -m MODULE ...` on a GPU that is not there."""

import argparse
import os
import sys

from tests.null_gpu.build import environment, missing


def main() -> None:
    """Ends as that command ends: the process becomes it."""
    parser = argparse.ArgumentParser(prog="python -m tests.null_gpu", description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="GPUs (default %(default)s)")
    parser.add_argument("--memory-gb", type=int, default=80, help="memory of each (default %(default)s)")
    parser.add_argument("--idle", action="store_true", help="compute nothing, and tell who waits for the GPU, by line")
    parser.add_argument("module", help="such as training")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    chosen = parser.parse_args()
    if lacking := missing():
        sys.exit(f"error: the null GPU cannot be built: {lacking} missing")
    there = environment(devices=chosen.devices, memory_gb=chosen.memory_gb)
    words = [*(["--idle"] if chosen.idle else []), chosen.module, *chosen.arguments]
    os.execve(sys.executable, [sys.executable, "-m", "tests.null_gpu.inside", *words], there)


if __name__ == "__main__":
    main()
