"""What every kind of source is: units of work that it lists, and crops that it reads, unit by unit.

Sources and units are picklable: whoever reads a unit may be another process on another machine, and the listing keeps
units in a file.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from datapipe.dataset.remarks import Remarks
from datapipe.sources.location import Location

UNKNOWN = -1
UNIT_CROPS = 2_048
"""Most crops of a unit, where a source can be cut anywhere."""
UNIT_BYTES = 32_000_000
"""Bytes at which a unit ends, where a source can be cut anywhere."""


class Crop(NamedTuple):
    """One image as it was found."""

    source: str
    """Label of the source: equal on every machine, so no path."""
    name: str
    """Name within the source, unique there; published lists refer to it."""
    data: bytes
    pid: int = UNKNOWN
    """Person, as the source numbers them (Market-1501's junk has -1 as well)."""
    camera: int = UNKNOWN
    """Camera, as the source numbers them, usually from 1."""
    video: str = ""
    """Name of the video within the source; empty where there is none."""
    track: int = UNKNOWN
    """Track of the person, unique within (source, video)."""
    frame: int = UNKNOWN
    """Frame of the video, as the source numbers them."""
    problem: str = ""
    """Why there is no image under this name: a link, a device. `data` is then empty; the scan quarantines the name."""
    unread: tuple[str, ...] = ()
    """Labels that are there and could not be understood, each with the reason; they are unknown here."""


class Unit(Protocol):
    """A part of a source that one process reads in one go: a frozen dataclass of text and numbers."""

    @property
    def bytes(self) -> int:
        """Bytes to read, for the progress."""

    @property
    def digest(self) -> str:
        """Changes when names or sizes in this part of the source change; the same on every machine."""


class Source(Protocol):
    """Where crops come from: a folder, an archive, a video ... Lists its work as units, reads one unit at a time."""

    @property
    def label(self) -> str:
        """The source's name in keys and indexes."""

    def units(self, remarks: Remarks | None = None) -> Iterator[Any]:
        """All work, always in the same order and cut in the same way; what is passed over on the way is counted in
        `remarks`. Raises DataError where there is none."""

    def read(self, unit: Any, remarks: Remarks | None = None) -> Iterator[Crop]:
        """The crops of a unit, always in the same order; `remarks` as for `units`. Raises DataError where the source is
        damaged."""


class Kind(Protocol):
    """A class of sources."""

    UNDERSTANDS: str
    """What its urls may point at, for messages."""

    @classmethod
    def at(cls, place: Location) -> Source | None:
        """The source there, if it is of this kind."""
