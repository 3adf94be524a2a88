"""Pickles that others wrote, read as data: lists, dicts, text and numbers. No code that one names is ever run."""

import io
import pickle
from typing import Any


class NamesCodeError(pickle.UnpicklingError):
    """A pickle names a function or a class; the message is that name, "module.name"."""


class _Plain(pickle.Unpickler):
    """Whatever names a function or a class is refused before it is looked at."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise NamesCodeError(f"{module_name}.{global_name}")

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def load_plain(data: bytes) -> Any:
    """What a pickle holds. Raises NamesCodeError where it names code; damaged ones end in any exception there is."""
    return _Plain(io.BytesIO(data)).load()
