"""The one loop that tries again: bounded by a number of tries and by time, with growing, jittered waits."""

import logging
import random
import time
from collections.abc import Callable
from itertools import count
from math import inf
from typing import TypeVar

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.core.progress import has_read

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0


class PassingFault(Exception):
    """A fault that may be gone at the next try.

    `final` is what the user reads when tries or time are used up; `after_s` is how long the store asked to wait;
    `within_s` ends the tries sooner than the configuration does.
    """

    def __init__(self, final: StorageError, *, after_s: float = 0.0, within_s: float = inf) -> None:
        super().__init__(final.what)
        self.final, self.after_s, self.within_s = final, after_s, within_s


def keep_trying(request: Callable[[], T], config: StorageConfig, *, where: str) -> T:
    """What `request` returns, called again after each PassingFault.

    Raises the fault's StorageError after `config.attempts` tries, or when the next try would begin later than
    `config.give_up_s` after the first one. The last try itself may take `config.timeout_s` more.
    """
    began = time.monotonic()
    for attempt in count(1):
        try:
            answer = request()
            has_read(len(answer) if isinstance(answer, bytes) else 1)
            return answer
        except PassingFault as fault:
            wait = max(_wait_s(attempt), fault.after_s)
            spent = time.monotonic() - began
            if attempt >= config.attempts or spent + wait > min(config.give_up_s, fault.within_s):
                raise _given_up(fault.final, attempt, spent) from fault.__cause__
            log.warning("%s: %s; try %d follows in %.1f s", where, fault, attempt + 1, wait)
        time.sleep(wait)
    raise AssertionError("the loop above returns or raises")


def _wait_s(attempt: int) -> float:
    """Seconds before the next try: doubled each time up to the longest wait, then a random half to whole of it."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


def _given_up(error: StorageError, tries: int, spent: float) -> StorageError:
    what = f"{error.what} (given up after {tries} {'try' if tries == 1 else 'tries'} in {spent:.1f} s)"
    return type(error)(what, where=error.where, hint=error.hint)
