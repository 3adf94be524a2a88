"""A grid as it stands: which cell may begin, what came of the others, and the table of all, written after each.

Who carries cells out, here or on a cluster, asks `next` and tells `begin`, `complete`, `failed` or `stopped`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Literal

from datapipe.core.errors import ConfigError, DataError, LeaseError, UserError
from datapipe.core.progress import counted
from datapipe.storage import Store
from training.evaluation import evaluation
from training.grid import table
from training.grid.carry_out import result_of
from training.grid.cells import Cell
from training.grid.planning import LeftOut

State = Literal["waiting", "under way", "complete", "failed"]
ATTEMPTS = 3
"""Times that a cell is carried out, where what ended it may not come again."""


class GridProgress:
    """Cells and their states."""

    def __init__(self, store: Store, show_line: Callable[[str], None] = print) -> None:
        """`store`: of the grid's folder."""
        self._store, self._show_line = store, show_line
        self._cells: dict[str, Cell] = {}
        self._states: dict[str, State] = {}
        self._why: dict[str, str] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._attempts: dict[str, int] = {}
        self._left_out: dict[str, LeftOut] = {}

    def add(self, cells: Iterable[Cell], left_out: Iterable[LeftOut] = ()) -> None:
        """Further cells; what was complete before stays so. Those that are known already are passed over."""
        new = [cell for cell in cells if cell.folder not in self._cells]
        for cell in new:
            self._cells[cell.folder], self._states[cell.folder] = cell, "waiting"
            if (result := result_of(cell)) is not None:
                self._states[cell.folder], self._results[cell.folder] = "complete", result
        for one in left_out:
            if one.what not in self._left_out:
                self._left_out[one.what] = one
                self._show_line(f"leaves out {one.what}: {one.why}")
        before = sum(cell.folder in self._results for cell in new)
        if before:
            self._show_line(f"{before} of {counted(len(new), 'cell')} were complete before")
        self._write()

    def next(self) -> Cell | None:
        """A cell that may begin; None: none now."""
        self._refuse_without_source()
        ready = (cell for name, cell in self._cells.items() if self._states[name] == "waiting"
                 and (not cell.source or self._states[cell.source] == "complete"))  # fmt: skip
        return next(ready, None)

    def begin(self, cell: Cell) -> None:
        """A cell is under way."""
        self._states[cell.folder] = "under way"
        self._attempts[cell.folder] = self._attempts.get(cell.folder, 0) + 1
        self._show_line(f"begins {cell.folder}")

    def complete(self, cell: Cell, result: dict[str, Any]) -> None:
        """A cell is complete."""
        self._states[cell.folder], self._results[cell.folder] = "complete", result
        scores = evaluation.headline(result["metrics"])
        self._show_line(f"{cell.folder}: mAP {100 * scores['mAP']:.1f}, Rank-1 {100 * scores['rank1']:.1f}  "
                        f"({len(self._results)} of {len(self._cells)})")  # fmt: skip
        self._write()

    def failed(self, cell: Cell, error: BaseException) -> None:
        """A cell ended by an error: it waits for another attempt, from where it was left, unless the error would come
        again."""
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        lasting = isinstance(error, ConfigError | DataError | LeaseError)
        if not lasting and self._attempts[cell.folder] < ATTEMPTS:
            self._states[cell.folder] = "waiting"
            self._show_line(f"{cell.folder} ended: {_first(what)}; attempt {self._attempts[cell.folder] + 1} of "
                            f"{ATTEMPTS} goes on from where it was")  # fmt: skip
            return
        self._states[cell.folder], self._why[cell.folder] = "failed", what
        self._show_line(f"{cell.folder} failed: {what}")
        self._refuse_without_source()
        self._write()

    def stopped(self, cell: Cell) -> None:
        """A cell was told to stop, and goes on another time."""
        self._states[cell.folder] = "waiting"

    @property
    def under_way(self) -> int:
        """How many cells are."""
        return sum(state == "under way" for state in self._states.values())

    @property
    def failures(self) -> int:
        """How many cells have failed."""
        return sum(state == "failed" for state in self._states.values())

    @property
    def cells(self) -> list[Cell]:
        """All, in the order in which they came."""
        return list(self._cells.values())

    def rows(self) -> list[dict[str, Any]]:
        """The table."""
        rows = [table.row_of(cell, self._states[name], self._why.get(name, ""), self._results.get(name))
                for name, cell in self._cells.items()]  # fmt: skip
        return rows + [table.left_out_row(**asdict(one)) for one in self._left_out.values()]

    def _refuse_without_source(self) -> None:
        for name, cell in self._cells.items():
            if self._states[name] == "waiting" and cell.source and self._states[cell.source] == "failed":
                self._states[name], self._why[name] = "failed", f"{cell.source} failed, which it begins with"
                self._show_line(f"{name} failed: {self._why[name]}")

    def _write(self) -> None:
        table.write(self._store, self.rows())


def _first(text: str) -> str:
    return text.partition("\n")[0]
