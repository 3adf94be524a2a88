"""Which rows of all shards a version of a data set consists of, in a parquet file named after its content."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet

from datapipe.core.bounds.parquet_pages import read_table
from datapipe.core.errors import DataError
from datapipe.storage import Store

BYTES_A_ROW, FREE_BYTES = 32, 1 << 24
"""Memory that reading takes: the numbers, and as they are stored."""
HINT = "copy the file again, or make the version anew with `python -m datapipe select`"


@dataclass(frozen=True)
class Selection:
    """A file with one int64 column `row`, sorted."""

    file: str
    sha256: str
    rows: int


def read_selection(store: Store, selection: Selection, stored_rows: int) -> np.ndarray:
    """The selected rows, int64, ascending, of `stored_rows` of all shards, verified against the manifest. Raises
    DataError that names the file."""
    where = store.address(selection.file)
    data = store.read_verified(selection.file, selection.sha256, what="the selection of this version", hint=HINT)
    try:
        if selection.rows > stored_rows:
            raise pyarrow.ArrowInvalid(f"it is said to have {selection.rows:,} of {stored_rows:,} rows")
        table = read_table(data, ["row"], rows=selection.rows, most_bytes=FREE_BYTES + BYTES_A_ROW * selection.rows)
        if table.schema.field("row").type != pyarrow.int64() or table["row"].null_count:
            raise pyarrow.ArrowInvalid("its rows are no whole numbers")
        rows = table["row"].to_numpy()
        if len(rows) and (rows[0] < 0 or rows[-1] >= stored_rows or (rows[1:] <= rows[:-1]).any()):
            raise pyarrow.ArrowInvalid("its rows are not rows of the shards in ascending order")
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"the selection of this version cannot be read: {error}", where=where, hint=HINT) from error
    return rows


def write_selection(store: Store, rows: np.ndarray) -> Selection:
    """Write sorted rows of all shards, int64."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"row": pyarrow.array(rows, pyarrow.int64())})
    encoding = {"row": "DELTA_BINARY_PACKED"}
    pyarrow.parquet.write_table(table, sink, compression="zstd", use_dictionary=False, column_encoding=encoding)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    selection = Selection(f"selections/{sha256[:16]}.parquet", sha256, len(rows))
    store.create_by_content(selection.file, data)
    return selection
