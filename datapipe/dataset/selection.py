"""Which rows of all shards a version of a data set consists of, in a parquet file named after its content."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet

from datapipe.core.errors import DataError
from datapipe.storage import Store

HINT = "copy the file again, or make the version anew with `python -m datapipe select`"


@dataclass(frozen=True)
class Selection:
    """A file with one int64 column `row`, sorted."""

    file: str
    sha256: str
    rows: int


def read_selection(store: Store, selection: Selection) -> np.ndarray:
    """The selected rows, int64, verified against the manifest. Raises DataError that names the file."""
    where = store.address(selection.file)
    data = store.read_verified(selection.file, selection.sha256, what="the selection of this version", hint=HINT)
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=["row"])["row"].to_numpy()
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
