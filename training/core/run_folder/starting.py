"""What a run is at before its first step, in starting.json: one line, for whoever asks how it stands."""

import contextlib
import json
import time
from typing import NamedTuple

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import StorageError
from training.core.run_folder.run_folder import RunFolder

NAME = "starting.json"


class Starting(NamedTuple):
    """The last line of a start."""

    doing: str
    """What is being done, or waited for."""
    waits: bool
    """Does it wait for machines?"""
    time: float
    """Unix time."""


def note(folder: RunFolder, doing: str, *, waits: bool = False) -> None:
    """Note what the start is at; empty: it is over. Not from several processes at once: the driver until there are
    workers, then the leading rank. Where it cannot be written nothing is: a start does not fail for want of it."""
    with contextlib.suppress(StorageError, OSError):
        folder.write_soon(NAME, json.dumps(Starting(doing, waits, time.time())._asdict()), hurry=True)


def read(folder: RunFolder) -> Starting | None:
    """The last line; None where there is none, the start is over, or the file is being written."""
    try:
        note = Starting(**parse_record(folder.read_text(NAME) or ""))
    except (ValueError, TypeError):
        return None
    return note if note.doing else None
