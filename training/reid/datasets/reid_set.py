"""What a labelled data set is: images of three parts, who is on them, and which camera saw them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

JUNK = -1
"""Identity of boxes that show no whole person: never in a ranking."""
DISTRACTOR = 0
"""Identity of Market-1501's gallery images of nobody who is asked for: they stay in the ranking and never match."""


class Images(Protocol):
    """Where the bytes are: a folder, an object store, or shards."""

    @property
    def url(self) -> str:
        """For messages."""

    def read(self, path: str) -> bytes:
        """The bytes of one image. Raises DataError or StorageError that name it."""

    def hashes(self, paths: Sequence[str]) -> NDArray[np.uint64]:
        """xxh3 of the bytes of each."""

    def keys(self, paths: Sequence[str]) -> list[str]:
        """The key of each in the shards it lies in, else its path."""


@dataclass(frozen=True)
class Labelled:
    """Images of one part, sorted by path. Cameras are 0-based; identities are the files' own numbers."""

    paths: NDArray[np.str_]
    """[N]: relative to the root of the set, '/'-separated."""
    pids: NDArray[np.int64]
    cameras: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N]: the identities as 0, 1, 2 ... in ascending order, as a classifier wants them."""
        return np.unique(self.pids, return_inverse=True)[1].astype(np.int64)

    @property
    def identities(self) -> int:
        """How many people there are, distractors counted as one."""
        return len(np.unique(self.pids))

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of images, identities and cameras."""
        return {"images": len(self), "identities": self.identities, "cameras": len(np.unique(self.cameras))}


@dataclass(frozen=True)
class ReIDSet:
    """A test set for retrieval, and the training identities where there are any."""

    name: str
    images: Images
    query: Labelled
    gallery: Labelled
    train: Labelled | None = None
    official: str = ""
    """The published data set that it is ("MSMT17"); empty: one of the user's own."""
    differences: tuple[str, ...] = ()
    """How it differs from the published one. Scores of such a set are not comparable with published ones."""
    warnings: tuple[str, ...] = ()
    """What is odd about it and was accepted."""

    @property
    def parts(self) -> dict[str, Labelled]:
        """The parts that are there, by name: "query", "gallery", "train"."""
        parts = {"query": self.query, "gallery": self.gallery, "train": self.train}
        return {name: part for name, part in parts.items() if part is not None}

    def read(self, path: str) -> bytes:
        """The bytes of one image, by its path in `Labelled`."""
        return self.images.read(str(path))

    def about(self) -> dict[str, Any]:
        """For the files of a result: name, counts of every part, differences, warnings."""
        return {
            "name": self.name,
            "official": self.official,
            "counts": {name: part.counts for name, part in self.parts.items()},
            "differences": list(self.differences),
            "warnings": list(self.warnings),
        }
