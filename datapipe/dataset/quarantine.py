"""The list of crops that were left out, and why: quarantine.parquet beside the manifest."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from datapipe.core.bounds.parquet_pages import open_parquet, read_table
from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.index import INDEX
from datapipe.dataset.remarks import METADATA, Remarks
from datapipe.storage import Store

NAME = "quarantine.parquet"
REFUSED = pyarrow.schema(
    [
        *(INDEX.field(name) for name in ("key", "source", "name")),
        ("reason", pyarrow.string()),
        ("detail", pyarrow.string()),
        ("bytes", pyarrow.int64()),  # as found
    ]
)
"""Columns of the list."""
T = TypeVar("T")
EXACT, NEAR = "exact duplicate", "near duplicate"
Reasons = dict[str, int]
"""Crops by the reason why they were left out."""


def write_quarantine(
    store: Store, tables: Iterable[pyarrow.Table], remarks: Remarks, *, local: Path | None = None
) -> Reasons:
    """Write the crops (REFUSED) as they come and count them. `local`: a folder with room for them."""
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix=".quarantine-", dir=local) as folder:
        file = Path(folder) / NAME
        with pyarrow.parquet.ParquetWriter(file, REFUSED, compression="zstd") as writer:
            writer.add_key_value_metadata({METADATA.decode(): remarks.to_json()})
            for table in tables:
                writer.write_table(table)
                counted = pyarrow.compute.value_counts(table["reason"]).to_pylist()
                reasons.update({entry["values"]: entry["counts"] for entry in counted})
        store.replace(NAME, file)
    return dict(sorted(reasons.items()))


def read_quarantine(store: Store) -> pyarrow.Table | None:
    """The list of a data set (REFUSED); None where there is none. Raises DataError where it is damaged."""
    return _of_list(store, lambda data: read_table(data, REFUSED.names).cast(REFUSED))


def read_remarks(store: Store) -> Remarks:
    """What was passed over and not understood when the data set was made; empty where nothing tells. Raises DataError
    where the list of quarantined crops, which has it, is damaged."""
    footer = _of_list(store, lambda data: open_parquet(data).metadata)
    return Remarks() if footer is None else Remarks.from_json((footer.metadata or {}).get(METADATA, b""))


def _of_list(store: Store, read: Callable[[bytes], T]) -> T | None:
    try:
        return read(store.read(NAME))
    except NotFoundError:
        return None
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"the list of quarantined crops cannot be read: {error}",
            where=store.address(NAME),
            hint="copy the file again; without it, nothing is known of what was left out",
        ) from error


def excluded(rows: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """The planned rows (`repartition`) that have no place in a shard, as REFUSED; the detail names the original."""
    for table in rows:
        left_out = table.filter(pyarrow.compute.less(table["place"], 0))
        if not left_out.num_rows:
            continue
        exact = pyarrow.compute.is_valid(left_out["duplicate_of"])
        columns = {
            **{name: left_out[name] for name in ("key", "source", "name")},
            "reason": np.where(exact.to_numpy(), EXACT, NEAR),
            "detail": pyarrow.compute.coalesce(left_out["duplicate_of"], left_out["near_of"]),
            "bytes": left_out["size"],
        }
        yield pyarrow.table({name: columns[name] for name in REFUSED.names}).cast(REFUSED)


def listed(reasons: Reasons) -> str:
    """For messages: "3 cut, 1 not an image"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
