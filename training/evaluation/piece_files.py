"""Finished pieces of work on a data set, a file each, in a folder beside what is made of them in the end.

The folder is called after the identity of the work, so that pieces of other weights, data or settings never mix.
Started again, only the missing pieces are worked on; once all is made of them they are deleted.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from datapipe.core.errors import NotFoundError
from datapipe.core.parallel import Executor
from datapipe.core.progress import Progress
from datapipe.storage import Store
from training.evaluation.image_pieces import CutDataSet, Piece


@dataclass(frozen=True)
class PieceFiles:
    """Where finished pieces are: a folder in the store `beside`. Picklable."""

    beside: Store
    folder: str

    @property
    def store(self) -> Store:
        """The store of the folder."""
        return self.beside.at(self.folder)

    def name(self, piece: Piece) -> str:
        """File of a piece."""
        return f"piece-{piece.number:05d}.parquet"

    def carry_out(
        self, data: CutDataSet, executor: Executor, work: Callable[..., int], task_of: Callable[[Piece], Any],
        device: object, *, label: str,
    ) -> list[str]:  # fmt: skip
        """Do what is missing by `work(task_of(piece), device)`, which writes the file of the piece and returns its
        images; the names of all files, in the order of the pieces."""
        there = set(self._present())
        missing = [piece for piece in data.pieces if self.name(piece) not in there]
        if len(missing) < len(data.pieces):
            done = len(data.pieces) - len(missing)
            print(f"{done:,} of {len(data.pieces):,} pieces are there already", flush=True)
        tasks = ((task_of(piece), device) for piece in missing)
        with Progress(label, data.images, unit="images") as progress:
            for _ in progress.over(executor.run(work, tasks, count=len(missing)), float):
                pass
        return list(map(self.name, data.pieces))

    def clear(self) -> None:
        """Delete all pieces, and what killed workers left of some."""
        for name in (*self._present(), *self.store.unfinished()):
            self.beside.delete(f"{self.folder}/{name}")

    def _present(self) -> list[str]:
        with suppress(NotFoundError):
            return [entry.name for entry in self.store.list()]
        return []
