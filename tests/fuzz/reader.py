"""What is fuzzed: a reader of files, the sound input that it is tried with, and inputs that were made to hurt it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Make = Callable[[Path], None]
"""Writes an input into an empty folder."""


def together(*makes: Callable[[Path], object]) -> Make:
    """What all of them write, one after the other."""

    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def nothing(folder: Path) -> None:
    """There is no checksum to be made again."""


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    name: str
    make: Make
    """The sound input."""
    changed: tuple[str, ...]
    """Patterns, below the folder, of the files that are changed."""
    look: Callable[[Path, Path], int]
    """(input, empty folder for output): reads as a user would, and gives the exit code. What it raises is a trace."""
    reseal: Make = nothing
    """Makes checksums right again that stand elsewhere, so that what was changed is read."""
    hostile: Mapping[str, Make] = field(default_factory=dict)
    """Name -> what writes an input that expands, has no end, or says what is not so."""
    writes: bool = False
    """Does it write beside what it reads, as a report does, and a packed index?"""
    refused: frozenset[str] = frozenset()
    """Hostile ones that must not end with exit code 0."""
