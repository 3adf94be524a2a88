"""Rows about crops in parquet files that were made of a data set: features, scores, pseudo labels.

A file of this kind has a column `key` or `name`, and `feature`, `score` or `label`. Its rows of removed crops are
deleted; the other rows, the columns and the metadata stay as they are. What holds crops by name and is none of these,
such as the index of a copy of the shards, is left to whoever knows it.
"""

import hashlib
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from datapipe.core.bounds.parquet_pages import open_parquet
from datapipe.dataset.index import KEY
from datapipe.maintain.crop_lists import canonical
from datapipe.storage import Store, open_object

ENDING = ".parquet"
VALUES = ("feature", "score", "label")
"""Columns of which one tells that a file is about crops and can lose rows."""
CROPS = ("key", "name")


class RowsFound(NamedTuple):
    """Rows of a parquet file that are of removed crops."""

    rows: int
    left: int
    """The other rows."""
    known: bool
    """Is it a file that can lose them?"""


class RemovedCrops:
    """Tells whether a row is of a removed crop.

    A row with a key of 32 hex digits is judged by that alone: other crops may have the same name in another source. One
    without is judged by its name, in full, or as far as the shorter of the two paths goes from its end.
    """

    def __init__(self, words: Collection[str], keys_sha256: Collection[str]) -> None:
        """`words`: keys and names of the crops. `keys_sha256`: SHA-256 (hex) of keys, as records of removals have
        them."""
        self.keys_sha256 = frozenset(keys_sha256)
        self.keys = {word.strip().lower() for word in words}
        listed = pyarrow.array([word for word in words if word], pyarrow.large_string())
        self.names = {name for name in canonical(listed, "name").to_pylist() if name}
        self.endings = {ending for name in self.names for ending in _endings(name)}

    def mask(self, table: pyarrow.Table) -> np.ndarray:
        """bool, for each row of a table with the columns `key`, `name` or both."""
        keys, names = (_text(table, column) for column in CROPS)
        return np.fromiter(map(self._removed, keys, names), bool, len(table))

    def _removed(self, key: str, name: str) -> bool:
        if re.match(KEY, key):
            return key in self.keys or hashlib.sha256(key.encode()).hexdigest() in self.keys_sha256
        return any(self._named(word) for word in (key, name) if word)

    def _named(self, name: str) -> bool:
        return name in self.endings or any(ending in self.names for ending in _endings(name))


def take_out(store: Store, name: str, removed: RemovedCrops) -> RowsFound | None:
    """Delete the rows of removed crops from a parquet file, and the file where no other row is left; a file of another
    kind stays. None: it is not about crops.

    It is read a group of rows at a time, twice where rows go, and replaced whole. Raises StorageError, and
    pyarrow.ArrowException or OSError where it is no parquet file.
    """
    with open_object(store, name) as source:
        file = open_parquet(source)
        columns = file.schema_arrow.names
        present = [column for column in CROPS if column in columns]
        if not present:
            return None
        masks = [removed.mask(file.read_row_group(group, present)) for group in range(file.num_row_groups)]
        gone = int(sum(mask.sum() for mask in masks))
        known = bool({*VALUES} & {*columns}) and not {"offset", "xxh3"} <= {*columns}
        left = file.metadata.num_rows - gone
        if gone and known and left:
            with tempfile.TemporaryDirectory(prefix="reid_rows_") as folder:
                path = Path(folder, "left.parquet")
                _write_left(file, masks, path)
                store.replace(name, path)
    if gone and known and not left:
        store.delete(name)
    return RowsFound(gone, left, known)


def _write_left(file: pyarrow.parquet.ParquetFile, masks: list[np.ndarray], path: Path) -> None:
    group = file.metadata.row_group(0)
    packed = group.column(0).compression.lower()
    words = [group.column(column).path_in_schema for column in range(group.num_columns)
             if "RLE_DICTIONARY" in group.column(column).encodings]  # fmt: skip
    with pyarrow.parquet.ParquetWriter(
        path, file.schema_arrow, compression=packed if packed != "uncompressed" else "none", use_dictionary=words
    ) as writer:
        for number, mask in enumerate(masks):
            rows = file.read_row_group(number).filter(pyarrow.array(~mask))
            if len(rows):
                writer.write_table(rows, row_group_size=len(rows))


def _text(table: pyarrow.Table, column: str) -> Iterator[str]:
    """A column as canonical text; empty where there is none."""
    if column not in table.column_names:
        return iter([""] * len(table))
    values = table[column].cast(pyarrow.large_string()).combine_chunks()
    return (value or "" for value in canonical(values, "name").to_pylist())


def _endings(name: str) -> Iterator[str]:
    """A path in full and without its first folders, one after the other."""
    while name:
        yield name
        name = name.partition("/")[2]
