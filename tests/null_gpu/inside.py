"""`python -m tests.null_gpu.inside [--idle] MODULE ...` runs a module where the null GPU is loaded: with its kernels
computed or, idle, with a count of who waits for it."""

import runpy
import sys

from tests.null_gpu.computed import computed
from tests.null_gpu.idle import Waiting, idle


def main() -> None:
    """As `python -m MODULE ...` would."""
    del sys.argv[0]
    if sys.argv[0] == "--idle":
        del sys.argv[0]
        with idle(), Waiting().watched():
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        with computed():
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
