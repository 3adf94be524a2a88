"""`python -m tests.null_gpu.inside MODULE ...` runs a module with kernels computed, where the null GPU is loaded."""

import runpy
import sys

from tests.null_gpu.computed import computed


def main() -> None:
    """As `python -m MODULE ...` would."""
    del sys.argv[0]
    with computed():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
