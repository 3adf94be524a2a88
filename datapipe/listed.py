"""Lists of crops that users bring along: by key, or by original name as published rankings have them."""

import io
import pickle
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from datapipe.config import StorageConfig
from datapipe.errors import DataError
from datapipe.index import whole_column
from datapipe.storage import open_store, split_url

By = Literal["key", "name"]
PICKLES = (".pkl", ".pickle")
FOLDERS, ENDINGS = r"^.*/", r"(?i)(\.(jpe?g|png|webp|bmp|tiff?|gif|ppm|pgm))+$"
EXAMPLES = 3


class Found(NamedTuple):
    """Which crop is meant by which line of a list."""

    place: np.ndarray
    """int64, for each crop its place in the list; -1 where it is not listed."""
    missing: int
    """Listed crops that are nowhere."""
    examples: list[str]
    """Some of these."""


def read_list(url: str, by: By, storage: StorageConfig) -> pyarrow.Array:
    """The keys or names in a file, as large strings in its order: text with one a line, parquet with a column of that
    name, or a pickled list (TransReID-SSL's CFS_list.pkl), which is read without running what it may hold."""
    folder, file = split_url(url)
    data = open_store(folder, storage).read(file)
    if url.lower().endswith(PICKLES):
        values = _unpickled(data, url)
    elif url.lower().endswith(".parquet"):
        values = _column(data, by, url)
    else:
        lines = data.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
        values = [line for line in (line.rstrip("\r") for line in lines.split("\n")) if line]
    listed = pyarrow.array(values, pyarrow.large_string())
    if not len(listed):
        raise DataError("the list is empty", where=url, hint=f"one {by} a line")
    return listed


def look_up(listed: pyarrow.Array, table: pyarrow.Table, by: By) -> Found:
    """Find the listed crops in a table with the column `by`.

    A name that is not found as it stands is looked for by its last part without ending, so that lists made for loose
    files fit other sources of the same images.
    """
    column = whole_column(table, by)
    place, lost = _match(listed, column)
    if by == "name" and len(lost):
        bare, still_lost = _match(_bare(listed.take(lost)), _bare(column))
        place = np.where((place < 0) & (bare >= 0), lost[bare], place)
        lost = lost[still_lost]
    return Found(place, len(lost), listed.take(lost[:EXAMPLES]).to_pylist())


def refuse_ambiguous(place: np.ndarray, listed: pyarrow.Array, where: str) -> None:
    """Raises DataError where several crops have the same place in a list."""
    places, counts = np.unique(place[place >= 0], return_counts=True)
    twice = places[counts > 1]
    if len(twice):
        raise DataError(
            f"{len(twice):,} listed names fit more than one crop, for example {listed[int(twice[0])]}",
            where=where,
            hint="narrow it down to one source, or list keys instead of names",
        )


def refuse_missing(found: Found, total: int, *, share: float, where: str) -> None:
    """Raises DataError where more than this share of a list is not in the data set."""
    if found.missing > share * total:
        raise DataError(
            f"{found.missing:,} of the {total:,} listed crops are not in the data set, for example "
            f"{', '.join(found.examples)}",
            where=where,
            hint=f"the indexes, shards/*.parquet, list them; --max-missing above {share:g} goes on without the missing",
        )


def _match(listed: pyarrow.Array, column: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """(for each of the column its place in the list, or -1; places in the list that the column does not have)."""
    place = pyarrow.compute.fill_null(pyarrow.compute.index_in(column, value_set=listed), -1).to_numpy()
    present = pyarrow.compute.is_in(listed, value_set=column).to_numpy(zero_copy_only=False)
    return place.astype(np.int64), np.flatnonzero(~present)


def _bare(names: pyarrow.Array) -> pyarrow.Array:
    """Last parts of names, without the endings of images."""
    replace = pyarrow.compute.replace_substring_regex
    return replace(replace(names, FOLDERS, ""), ENDINGS, "")


def _column(data: bytes, by: By, url: str) -> list[str]:
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=[by])[by].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(
            f"the list is no parquet file with a column `{by}`",
            where=url,
            hint=f"or give a text file with one {by} a line",
        ) from error


class _Plain(pickle.Unpickler):
    """Knows lists, text and numbers; whatever names a function or a class is refused before it is looked at."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}")

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def _unpickled(data: bytes, url: str) -> list[str]:
    try:
        found = _Plain(io.BytesIO(data)).load()
        if not isinstance(found, list | tuple):
            raise TypeError(f"it is of type {type(found).__name__}")
        return [item.decode() if isinstance(item, bytes) else _text(item) for item in found]
    except Exception as error:  # damaged pickles end in any exception there is
        raise DataError(
            f"the pickle is no plain list of names: {error}",
            where=url,
            hint="a pickled list of text, or a text file with one name a line",
        ) from error


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise TypeError(f"an item is of type {type(item).__name__}")
    return item
