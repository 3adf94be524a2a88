"""Blocks of a checkpoint that one rank of a machine fetches for all of them, through a folder on its disk.

Nothing depends on the folder: a block that is not to be had there is read from the store. Its bytes are checked by
whoever reads them, as those from the store are.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from datapipe.core.errors import StorageError
from datapipe.storage import Store, is_remote
from training.checkpoint.metadata import Marker
from training.core.world import World

if TYPE_CHECKING:
    from datapipe.stream.disk_cache import DiskCache

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_OF_DISK = 0.5
"""Of what is free."""


class MachineBlocks:
    """The blocks that this machine holds."""

    def __init__(self, cache: "DiskCache", marker: Marker, world: World) -> None:
        self._cache, self._world = cache, world
        self._sha256 = {file.name: file.sha256 for file in marker.files}

    def load(self, file: str, start: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Bytes [start, start + size) of a file, fetched by this rank or another one."""
        key, parts = self._key(file, start, size), [(0, size)]
        return (self._cache.held(key, parts) or self._cache.load(key, parts, fetch))[0]

    def forget(self, file: str, start: int, size: int) -> None:
        """Drop a block whose bytes were found to be wrong."""
        self._cache.forget(self._key(file, start, size))

    def drop(self) -> None:
        """Delete all blocks of the checkpoint; once no rank of the machine reads them any more."""
        self._cache.drop(self._sha256.values())

    def in_turn(self, blocks: Sequence[T]) -> list[T]:
        """In the order in which this rank takes them: each rank of the machine begins at another place, so that they
        fetch different ones."""
        first = len(blocks) * self._world.local_rank // self._world.local_size
        return [*blocks[first:], *blocks[:first]]

    def _key(self, file: str, start: int, size: int) -> str:
        return f"{self._sha256[file]}-{start}-{size}"


def shared_blocks(store: Store, marker: Marker, world: World) -> MachineBlocks | None:
    """None where there is nothing to share: one rank on this machine, a store on its disks, or no room there."""
    if world.local_size == 1 or not is_remote(store.url):
        return None
    folder = os.path.join(tempfile.gettempdir(), f"checkpoint-blocks-{os.getuid()}")
    try:
        from datapipe.stream.disk_cache import DiskCache  # its checksums are a package that the loop does without

        free = shutil.disk_usage(os.path.dirname(folder)).free
        cache = DiskCache(folder, min(marker.size, int(MOST_OF_DISK * free)))
    except (ImportError, OSError, StorageError) as error:
        log.warning("each rank reads the checkpoint for itself: %s", error)
        return None
    return MachineBlocks(cache, marker, world)
