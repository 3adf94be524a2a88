"""New duplicate marks for the copies that a removed crop leaves behind. Pure."""

from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.dataset.duplicates import near_duplicates
from datapipe.dataset.index import MARKS, RowMarks, whole_column


def relink_duplicates(table: pyarrow.Table, live: np.ndarray, gone: pyarrow.Array) -> dict[int, RowMarks]:
    """New marks of the live rows that are marked as copies of a crop whose key is gone.

    table: rows in the order of the data set, columns `key`, `dhash` and MARKS. Among equal crops the first that is left
    is the original. Among those that were near to a crop that is gone, the first is one, and so is each that is near
    to none of these.
    """
    columns = {name: whole_column(table, name) for name in ("key", "dhash", *MARKS)}
    exact = {row: rows[0] for rows in _orphans(columns["duplicate_of"], live, gone) for row in rows}
    near = {
        row: original
        for rows in _orphans(columns["near_of"], live, gone)
        for row, original in _originals(np.array(rows), columns["dhash"])
    }
    inherited = dict(zip(MARKS, (exact, near), strict=True))

    def mark(name: str, row: int) -> str | None:
        original = inherited[name].get(row)
        return columns[name][row].as_py() if original is None else _key(columns["key"], row, original)

    return {row: (mark("duplicate_of", row), mark("near_of", row)) for row in sorted(exact.keys() | near.keys())}


def _orphans(marks: pyarrow.Array, live: np.ndarray, gone: pyarrow.Array) -> list[list[int]]:
    """Live rows that are marked as copies of a crop that is gone; those of one such crop together, in order."""
    orphaned = pyarrow.compute.is_in(marks, value_set=gone).to_numpy(zero_copy_only=False)
    groups: dict[str, list[int]] = {}
    for row in np.flatnonzero(orphaned & live).tolist():
        groups.setdefault(marks[row].as_py(), []).append(row)
    return list(groups.values())


def _originals(rows: np.ndarray, dhash: pyarrow.Array) -> Iterator[tuple[int, int]]:
    """Each row with the one it is near to, or with itself."""
    original = rows.copy()
    places, originals = near_duplicates(dhash.take(rows).to_numpy(), np.ones(len(rows), np.uint64))
    original[places] = rows[originals]
    return zip(rows.tolist(), original.tolist(), strict=True)


def _key(keys: pyarrow.Array, row: int, original: int) -> str | None:
    return None if row == original else keys[original].as_py()
