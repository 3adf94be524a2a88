"""Brings the rows of the scan, part by part, into files from which each shard's task reads its own rows.

One pass over the parts; whatever the number of crops, CHUNK rows are in memory. A file holds the rows of a few
neighbouring shards, as Arrow streams one after the other: each time that rows for it have come together, one more.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow

from datapipe.core.errors import DataError
from datapipe.dataset.duplicates import Marks
from datapipe.dataset.index import INDEX
from datapipe.ingest.shard_plan import Candidates, Plan, key_texts, places
from datapipe.storage import Store

SHARDS_PER_FILE = 8
CHUNK = 250_000
"""Rows that are sorted in memory before they go to their files."""
PLANNED = pyarrow.schema(
    [
        ("place", pyarrow.int64()),  # in the plan
        *(field for field in INDEX if field.name not in ("offset", "removed")),
        ("url", pyarrow.string()),  # the object that holds the JPEG now
        ("start", pyarrow.int64()),  # of the JPEG within it
    ]
)
COMPLETE = "complete"


def rows_file(plan: Plan, shard: int) -> str:
    """The object of the spool with the rows of a shard."""
    return f"{_folder(plan)}/{shard // SHARDS_PER_FILE:06d}.arrows"


def repartition(
    plan: Plan, crops: Candidates, parts: Iterable[pyarrow.Table], spool: Store, *, local: Path | None = None
) -> None:
    """Write the file of every shard into the spool, unless an earlier run did.

    `parts`: the rows of the candidates in their order, cut anywhere, with the columns of PLANNED besides `place` and
    the marks. `local`: where files grow until they are complete; the temporary folder by default.
    """
    done = f"{_folder(plan)}/{COMPLETE}"
    if spool.exists(done):
        return
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=local) as folder:
        for chunk in _chunks(planned(plan, crops, parts)):
            _append(plan, chunk, Path(folder))
        for shard in range(0, plan.shards, SHARDS_PER_FILE):
            name = rows_file(plan, shard)
            spool.replace(name, Path(folder) / Path(name).name)
    spool.replace(done, b"")


def planned(plan: Plan, crops: Candidates, parts: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """Each part with `place` and the marks; crops that were excluded have the place -1."""
    place = places(plan.order, len(crops))
    start = 0
    for part in parts:
        end = start + part.num_rows
        columns = {
            **{name: part[name] for name in part.column_names},
            "place": place[start:end],
            "duplicate_of": _originals(plan.exact, crops, start, end),
            "near_of": _originals(plan.near, crops, start, end),
        }
        yield pyarrow.table({name: columns[name] for name in PLANNED.names}).cast(PLANNED)
        start = end


def rows_of_places(spool: Store, name: str, first: int, end: int) -> pyarrow.Table:
    """The rows (PLANNED) of the places [first, end), in their order. DataError where some are missing."""
    data = pyarrow.BufferReader(spool.read(name))
    tables = []
    while data.tell() < data.size():
        table = pyarrow.ipc.open_stream(data).read_all()
        place = table["place"].to_numpy()  # ascending within one stream
        low, high = np.searchsorted(place, (first, end))
        tables.append(table.slice(low, high - low))
    rows = pyarrow.concat_tables(tables)
    rows = rows.take(np.argsort(rows["place"].to_numpy()))
    if not np.array_equal(rows["place"].to_numpy(), np.arange(first, end)):
        raise DataError(
            "the spool was damaged since the crops were planned",
            where=spool.address(name),
            hint="delete the spool folder and run the same command again",
        )
    return rows


def _folder(plan: Plan) -> str:
    return f"plan-{plan.id[:32]}"


def _originals(marks: Marks, crops: Candidates, start: int, end: int) -> pyarrow.Array:
    """Key of the original of each row in [start, end); null where it is marked as no duplicate."""
    low, high = np.searchsorted(marks.places, (start, end))
    keys = np.full(end - start, None, object)
    keys[marks.places[low:high] - start] = key_texts(crops.key[marks.originals[low:high]])
    return pyarrow.array(keys, pyarrow.string())


def _chunks(parts: Iterator[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    waiting: list[pyarrow.Table] = []
    for part in parts:
        for start in range(0, part.num_rows, CHUNK):
            waiting.append(part.slice(start, CHUNK))
            if sum(table.num_rows for table in waiting) >= CHUNK:
                yield pyarrow.concat_tables(waiting)
                waiting = []
    if waiting:
        yield pyarrow.concat_tables(waiting)


def _append(plan: Plan, rows: pyarrow.Table, folder: Path) -> None:
    """Sort rows by their place and add them to the files of their shards."""
    place = rows["place"].to_numpy()
    order = np.argsort(place)[np.count_nonzero(place < 0) :]
    rows = rows.take(order).combine_chunks()
    files = plan.cuts[::SHARDS_PER_FILE]
    begins = np.searchsorted(place[order], np.append(files[files < plan.cuts[-1]], plan.cuts[-1]))
    for number, (begin, end) in enumerate(zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)):
        if begin < end:
            with (
                open(folder / Path(rows_file(plan, number * SHARDS_PER_FILE)).name, "ab") as file,
                pyarrow.ipc.new_stream(file, rows.schema, options=_OPTIONS) as stream,
            ):
                stream.write_table(rows.slice(begin, end - begin))


_OPTIONS = pyarrow.ipc.IpcWriteOptions(compression="lz4")
