"""What each rank says of the part that it has written: to the leading rank, whose marker holds the table of all parts.

The words go by the store in which the ranks met when they began, from threads beside the training. That takes neither a
collective nor a request to the run's storage, and the leading rank asks for all of them at once.
"""

import json
import zlib
from dataclasses import asdict
from typing import NamedTuple

from torch import distributed

from datapipe.core.errors import StorageError
from training.checkpoint.metadata import Form, RankFile, file_from
from training.core.world import World

KEY = "checkpoint/part"
MOST_BYTES = 4 << 20
"""Of one value: torch's TCPStore takes no more than 8 MiB."""
HINT = "the next save writes it anew"


class Announcement(NamedTuple):
    """A part of a checkpoint."""

    file: RankFile
    tensors: dict[str, Form]
    """Of which it holds fragments."""


class Announcements:
    """What ranks announce of the present save. The next save overwrites it, so that it takes no more room."""

    def __init__(self, world: World, store: distributed.Store | None = None) -> None:
        """`store`: other than the one in which the ranks met."""
        self._world, self._given = world, store
        self._own: tuple[str, Announcement] | None = None

    def announce(self, save: str, part: Announcement) -> None:
        """Say that this rank's part of a save is on the run's storage. From any thread; waits for nobody."""
        if self._world.is_leader:
            self._own = save, part
            return
        content = zlib.compress(json.dumps([asdict(part.file), part.tensors]).encode(), level=1)
        first, *others = [content[start : start + MOST_BYTES] for start in range(0, len(content), MOST_BYTES)]
        key = self._key(self._world.rank)
        for number, piece in enumerate(others, start=1):
            self._set(f"{key}/{number}", piece)
        self._set(key, json.dumps([save, len(others)]).encode() + b"\n" + first)

    def of_all(self, save: str) -> list[Announcement]:
        """The parts of all ranks, in their order; on the leading rank, once all have announced theirs. Raises
        StorageError where one has not."""
        if self._own is None or self._own[0] != save:
            raise self._missing(0)
        others = range(1, self._world.size)
        values = zip(others, self._values(others), strict=True)
        return [self._own[1], *(self._read(rank, save, value) for rank, value in values)]

    @property
    def _store(self) -> distributed.Store:
        return self._given if self._given is not None else self._world.rendezvous

    def _set(self, key: str, value: bytes) -> None:
        """Store bytes under a key of the ranks' store, whose type stub knows only text."""
        self._store.set(key, value)  # type: ignore[arg-type]

    def _values(self, ranks: range) -> list[bytes]:
        keys = [self._key(rank) for rank in ranks]
        if not keys:
            return []
        if not self._store.check(keys):  # to get what is not there would wait
            raise self._missing(next(rank for rank in ranks if not self._store.check([self._key(rank)])))
        values: list[bytes] = self._store.multi_get(keys)
        return values

    def _read(self, rank: int, save: str, value: bytes) -> Announcement:
        head, _, content = value.partition(b"\n")
        stated, more = json.loads(head)
        if stated != save:
            raise self._missing(rank)
        keys = [f"{self._key(rank)}/{number}" for number in range(1, more + 1)]
        file, tensors = json.loads(zlib.decompress(b"".join([content, *(self._store.multi_get(keys) if keys else [])])))
        return Announcement(
            file_from(file), {key: Form(tuple(shape), dtype) for key, (shape, dtype) in tensors.items()}
        )

    @staticmethod
    def _key(rank: int) -> str:
        return f"{KEY}/{rank}"

    @staticmethod
    def _missing(rank: int) -> StorageError:
        return StorageError(f"rank {rank} has not announced its part of the checkpoint", hint=HINT)
