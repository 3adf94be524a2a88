"""Warnings that a process tells once, however often it meets what they tell of."""

import logging
from functools import cache


@cache
def warn_once(log: logging.Logger, line: str) -> None:
    """Log the line as a warning, unless this process has done so before."""
    log.warning("%s", line)
