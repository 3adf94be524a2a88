"""Do all machines see the same files under the same path? Found out by looking, not by asking the user."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from datapipe.core.errors import StorageError
from datapipe.storage import is_remote

MARK = ".shared-"
"""Beginning of the name of an empty file that only the driver can have put there."""


class Witness(NamedTuple):
    """A file that whoever sees the place sees there, too."""

    place: str
    """The folder or file that the user named."""
    file: str
    bytes: int


@contextlib.contextmanager
def marked(folders: Sequence[str]) -> Iterator[tuple[Witness, ...]]:
    """Leave a mark in folders that are written to, for as long as the context lasts.

    A mark that a killed run left is used again. Names are random: a network file system may remember for a while that
    a name was absent. Raises StorageError where a folder cannot be made.
    """
    marks = []
    try:
        for folder in folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
            existing = sorted(Path(folder).glob(f"{MARK}*"))
            marks.append(existing[0] if existing else Path(folder) / f"{MARK}{secrets.token_hex(8)}")
            marks[-1].touch()
    except OSError as error:
        raise StorageError(f"the folder cannot be written: {error.strerror}", where=str(error.filename),
                           hint="check the permissions there, or choose another folder") from error  # fmt: skip
    try:
        yield tuple(Witness(str(mark.parent), str(mark), 0) for mark in marks)
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def witnesses(sources: Sequence[str]) -> tuple[Witness, ...]:
    """A file of each local source: the source itself, or the first one that its folder happens to list."""
    first_files = ((source, _first_file(_fixed(source))) for source in sources if not is_remote(source))
    return tuple(Witness(source, file, os.path.getsize(file)) for source, file in first_files if file)


def _fixed(source: str) -> str:
    """A pattern up to its first brace or wildcard; what is there as it is written is none."""
    return source if os.path.exists(source) else re.split(r"[{*?\[]", source, maxsplit=1)[0]


def _first_file(path: str) -> str | None:
    """A file at or below `path`, or beside it where a pattern was cut off; None: the source is missing or empty,
    which is for whoever opens it to say."""
    if os.path.isfile(path):
        return path
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.isdir(folder):
        return None
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                return entry.path
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
    return next(filter(None, map(_first_file, below)), None)


@lru_cache(maxsize=8)
def unseen(seen: tuple[Witness, ...]) -> tuple[str, ...]:
    """The places that this machine does not see as the driver does; looked at once per process."""
    return tuple(witness.place for witness in seen if not _is_there(witness))


def _is_there(witness: Witness) -> bool:
    try:
        return os.path.getsize(witness.file) == witness.bytes
    except OSError:
        return False
