"""Pickles that others wrote, read as data: lists, dicts, text and numbers. No code that one names is ever run."""

import io
import pickle
import re
from typing import Any

import numpy as np

MOST_CONTAINERS = 2_000_000
"""Lists, dicts and sets of a pickle: one byte makes each, and 200 bytes of memory. A list of names has one."""
_CONTAINERS = (b"]", b"}", b"\x8f")
_TEXT_PUT = re.compile(rb"p([0-9]{6,20})\n")


class NamesCodeError(pickle.UnpicklingError):
    """A pickle names a function or a class; the message is that name, "module.name"."""


class _Plain(pickle.Unpickler):
    """Whatever names a function or a class is refused before it is looked at."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise NamesCodeError(f"{module_name}.{global_name}")

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


class _PlainSlowly(pickle._Unpickler):  # the same, written in Python
    """A reader of pickles whose memo is a dict: the quick one has room for all numbers up to the highest used."""

    def find_class(self, module: str, name: str) -> Any:
        raise NamesCodeError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def load_plain(data: bytes) -> Any:
    """What a pickle holds. Raises NamesCodeError where it names code, ValueError where it is of more lists than a list
    of names has; damaged ones end in any exception there is."""
    if len(data) > MOST_CONTAINERS and sum(map(data.count, _CONTAINERS)) > MOST_CONTAINERS:
        raise ValueError(f"it has more than {MOST_CONTAINERS:,} lists and dicts, or bytes that may be such")
    kind = _PlainSlowly if _has_large_memo(data) else _Plain
    return kind(io.BytesIO(data)).load()


def _has_large_memo(data: bytes) -> bool:
    """Whether there are bytes that may put something into the memo under a number that so short a pickle never comes
    to. "r" and four bytes do so in pickles of today, "p" and digits in old ones; both may be part of a name."""
    most = max(1_000, len(data))
    if any(int(match[1]) > most for match in _TEXT_PUT.finditer(data)):
        return True
    content = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(content[:-4] == ord("r"))
    numbers = sum(content[places + 1 + byte].astype(np.uint64) << np.uint64(8 * byte) for byte in range(4))
    return bool(np.any(numbers > most))
