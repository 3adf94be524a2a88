"""What the rows of a data set say of one another, checked: keys are unique, and marks of duplicates are true."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.dataset.duplicates import DISTANCE, exact_duplicates
from datapipe.dataset.index import content_words, whole_column

MOST = 20
"""Findings of a kind listed one by one; more are counted."""
NOWHERE = -1


class Finding(NamedTuple):
    """Something wrong: where it is, down to the crop, and what it is."""

    where: str
    what: str


def relation_findings(table: pyarrow.Table, where: str) -> list[Finding]:
    """Check the rows of all crops of a data set, in their order, against one another. Columns of `table`: `key`,
    `sha256`, `dhash`, `duplicate_of`, `near_of`."""
    keys = whole_column(table, "key")
    places = _places(keys, keys)
    repeated = np.flatnonzero(places != np.arange(len(keys)))
    if len(repeated):
        return _listed(keys, repeated, "the key occurs more than once", where)
    return [
        finding
        for what, rows in (*_exact(table, keys), *_near(table, keys))
        for finding in _listed(keys, rows, what, where)
    ]


def _exact(table: pyarrow.Table, keys: pyarrow.Array) -> Iterator[tuple[str, np.ndarray]]:
    marked, originals = _originals(whole_column(table, "duplicate_of"), keys)
    yield "it is marked as a duplicate of a crop that is not there", marked[originals == NOWHERE]
    true = exact_duplicates(content_words(table))
    stated, is_true = np.full(len(keys), NOWHERE), np.full(len(keys), NOWHERE)
    stated[marked], is_true[true.places] = originals, true.originals
    unmarked = np.ones(len(keys), bool)
    unmarked[marked] = False
    yield "it is a duplicate and not marked", np.flatnonzero((is_true >= 0) & unmarked)
    yield (
        "it is marked as a duplicate of a crop whose bytes are others, or come later",
        np.flatnonzero((stated >= 0) & (stated != is_true)),
    )


def _near(table: pyarrow.Table, keys: pyarrow.Array) -> Iterator[tuple[str, np.ndarray]]:
    marked, originals = _originals(whole_column(table, "near_of"), keys)
    yield "it is marked as nearly equal to a crop that is not there", marked[originals == NOWHERE]
    marked, originals = marked[originals >= 0], originals[originals >= 0]
    dhash = table["dhash"].to_numpy()
    far = np.bitwise_count(dhash[marked] ^ dhash[originals]) > DISTANCE
    yield "it is marked as nearly equal to a crop that looks different", marked[far]


def _originals(marks: pyarrow.Array, keys: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """(rows that are marked, for each the row it is marked with or NOWHERE)."""
    marked = np.flatnonzero(pyarrow.compute.is_valid(marks).to_numpy(zero_copy_only=False))
    return marked, _places(marks.take(marked), keys)


def _places(wanted: pyarrow.Array, keys: pyarrow.Array) -> np.ndarray:
    """The first row of each key, int64."""
    rows = pyarrow.compute.index_in(wanted, value_set=keys)
    return pyarrow.compute.fill_null(rows, NOWHERE).to_numpy().astype(np.int64)


def _listed(keys: pyarrow.Array, rows: np.ndarray, what: str, where: str) -> list[Finding]:
    findings = [Finding(f"{where}: {keys[row].as_py()}.jpg", what) for row in rows[:MOST].tolist()]
    return findings + [Finding(where, f"and {len(rows) - MOST:,} more: {what}")] * (len(rows) > MOST)
