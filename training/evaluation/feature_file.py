"""Features of images in one parquet file: written piece by piece, read by anything that reads parquet.

One row per image: `key`, `name`, `pid`, `camera` and `part` (see `image_pieces.LABELS`), and `feature`, a list of fixed
size of float32 or float16, as the backbone gives it: not divided by its norm. The schema's metadata have, as JSON under
`reid_features`, what the features are of: weights, feature, size, interpolation, normalisation of images, data set.

    F.parquet                        whole, or not there at all
    F.parquet.pieces-<id>/*.parquet  finished pieces of one that is still being made, of these weights, data, settings
"""

import io
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from datapipe.core.bounds.parquet_pages import measured, open_parquet, read_table, refuse_large
from datapipe.core.bounds.text_trees import parse_json
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, StorageError
from datapipe.maintain.crop_lists import look_up
from datapipe.storage import Store, full_url, is_remote, open_object, open_store, split_url
from datapipe.storage.store import TEMPORARY
from training.evaluation.image_pieces import LABELS
from training.weights.counted_keys import first_few

METADATA = b"reid_features"
FORMAT = 1
FEATURE = "feature"
ENDING = ".parquet"
HINT = "one row per image with `key` or `name`, and `feature`, a list of numbers"


def schema(header: dict[str, Any]) -> pyarrow.Schema:
    """The columns and metadata of a file with this header, which has `channels` and `dtype`."""
    value = {"float32": pyarrow.float32(), "float16": pyarrow.float16()}[header["dtype"]]
    feature = pyarrow.field(FEATURE, pyarrow.list_(pyarrow.field("element", value, nullable=False), header["channels"]))
    return LABELS.append(feature).with_metadata({METADATA: json.dumps(header).encode()})


def table(labels: pyarrow.Table, features: NDArray[np.floating], header: dict[str, Any]) -> pyarrow.Table:
    """A row for each image: what is known of it, and its feature [N, C], rounded to the dtype of the header."""
    wanted = schema(header)
    values = np.ascontiguousarray(features.astype(header["dtype"], copy=False)).reshape(-1)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), type=wanted.field(FEATURE).type)
    return pyarrow.table([*labels.columns, column], schema=wanted)


def serialised(rows: pyarrow.Table) -> bytes:
    """A parquet file with these rows as one group."""
    sink = io.BytesIO()
    with _writer(sink, rows.schema) as writer:
        writer.write_table(rows, row_group_size=max(1, len(rows)))
    return sink.getvalue()


def merge(pieces: Store, names: Sequence[str], url: str, storage: StorageConfig, columns: pyarrow.Schema) -> int:
    """Make one file of pieces, one in memory at a time, and put it where it belongs once it is whole; its rows.

    It is written beside its place, or, for an object store, among the temporary files, which need room for it.
    """
    folder, name = split_url(url)
    rows = 0
    with _temporary(folder, name) as path:
        with open(path, "wb") as file, _writer(file, columns) as writer:
            for piece in names:
                part = pyarrow.parquet.read_table(pyarrow.BufferReader(pieces.read(piece)))
                rows += len(part)
                if len(part):
                    writer.write_table(part, row_group_size=len(part))
        if is_remote(url):
            open_store(folder, storage).replace(name, path)
        else:
            _publish(path, Path(full_url(url)))
    return rows


@contextmanager
def _temporary(folder: str, name: str) -> Iterator[Path]:
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="reid_features_") as here:
            yield Path(here, name)
        return
    beside = Path(full_url(folder))
    beside.mkdir(parents=True, exist_ok=True)
    path = beside / f".{name}.{secrets.token_hex(6)}{TEMPORARY}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish(path: Path, final: Path) -> None:
    """Give a local file its name, once its bytes are on the disk."""
    _sync(path)
    os.replace(path, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _writer(sink: Any, columns: pyarrow.Schema) -> pyarrow.parquet.ParquetWriter:
    words = [name for name in ("part",) if name in columns.names]
    return pyarrow.parquet.ParquetWriter(sink, columns, compression="zstd", use_dictionary=words,
                                         write_statistics=words)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- reading


@contextmanager
def opened(url: str, storage: StorageConfig) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A parquet file anywhere. Raises NotFoundError, and DataError for what is none."""
    with _opened(url, storage) as (_, found):
        yield found


@contextmanager
def _opened(url: str, storage: StorageConfig) -> Iterator[tuple[BinaryIO, pyarrow.parquet.ParquetFile]]:
    folder, name = split_url(url)
    file: BinaryIO = open_object(open_store(folder, storage), name)
    with file:
        try:
            found = open_parquet(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"this is no parquet file: {error}", where=url, hint=HINT) from error
        try:
            yield file, found
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"the parquet file cannot be read: {error}", where=url, hint=HINT) from error


def header_of(url: str, storage: StorageConfig) -> dict[str, Any] | None:
    """What a file says of its features; empty: it is somebody else's; None: there is no file."""
    with suppress(NotFoundError), opened(url, storage) as file:
        return read_header(file)
    return None


def read_header(file: pyarrow.parquet.ParquetFile) -> dict[str, Any]:
    """What the metadata say of the features; empty where they are not ours."""
    try:
        header = parse_json((file.schema_arrow.metadata or {})[METADATA])
        return header if isinstance(header, dict) else {}
    except (KeyError, ValueError):
        return {}


@dataclass(frozen=True)
class FoundFeatures:
    """Features of the images that were asked for."""

    values: NDArray[np.floating]
    """[N, C], in the order asked for; float32, or float64 where the file has that."""
    header: dict[str, Any]
    """What the file says of them; empty: nothing that we know."""
    rows: int
    """Rows of the file."""
    extra: int
    """Rows of other images."""


def read_features(url: str, storage: StorageConfig, *, keys: Sequence[str], names: Sequence[str]) -> FoundFeatures:
    """The features of these images, found by their keys, or else by their names as lists of crops are (see
    `crop_lists.look_up`): in full, without first folders, by the last part without ending.

    Raises DataError, with numbers and examples, for images without a row or with several, for features of different or
    no lengths, and for ones that are not finite.
    """
    with _opened(url, storage) as (source, file):
        columns = file.schema_arrow
        if FEATURE not in columns.names or not {"key", "name"} & {*columns.names}:
            raise DataError(f"the file has the columns {', '.join(columns.names)}", where=url, hint=HINT)
        value = _value_type(columns.field(FEATURE).type, url)
        refuse_large(measured(source, file, [FEATURE]).total, source.seek(0, 2))
        place = _places(source, file, keys, names, url)
        dtype = np.dtype(np.float64 if value == pyarrow.float64() else np.float32)
        values = _Rows(len(names), dtype, names, url)
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            mine = place[start : start + rows]
            start += rows
            chosen = np.flatnonzero(mine >= 0)
            if len(chosen):
                column = file.read_row_group(group, [FEATURE])[FEATURE].combine_chunks()
                values.put(mine[chosen], column.take(pyarrow.array(chosen)))
        return FoundFeatures(values.complete(), read_header(file), len(place), int((place < 0).sum()))


def _value_type(kind: pyarrow.DataType, url: str) -> pyarrow.DataType:
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(check(kind) for check in lists) or not pyarrow.types.is_floating(kind.value_type):
        raise DataError(f"the column `{FEATURE}` is of type {kind}", where=url, hint=HINT)
    return kind.value_type


def _places(
    source: BinaryIO,
    file: pyarrow.parquet.ParquetFile,
    keys: Sequence[str],
    names: Sequence[str],
    url: str,
) -> NDArray[np.int64]:
    """For each row of the file the number of the image it is of; -1: none of these."""
    place = np.full(file.metadata.num_rows, -1)
    for column, wanted in (("key", keys), ("name", names)):
        missing = np.setdiff1d(np.arange(len(wanted)), place)
        if column not in file.schema_arrow.names or not len(missing):
            continue
        words = read_table(source, [column])[column].cast(pyarrow.large_string())
        words = pyarrow.compute.fill_null(words, "")
        listed = pyarrow.array([wanted[image] for image in missing.tolist()], pyarrow.large_string())
        if column == "key":
            at = pyarrow.compute.fill_null(pyarrow.compute.index_in(words, value_set=listed), -1).to_numpy()
        else:
            at = look_up(listed, pyarrow.table({"name": words}), "name").place
        place = np.where((place < 0) & (at >= 0), missing[at], place)
    missing = np.setdiff1d(np.arange(len(names)), place)
    if len(missing):
        lost = [names[image] for image in missing.tolist()]
        raise DataError(f"{len(lost):,} of the {len(names):,} images have no row: {first_few(lost)}", where=url,
                        hint="the column `name` holds paths below the data set's root, or file names")  # fmt: skip
    found, counts = np.unique(place[place >= 0], return_counts=True)
    if len(several := found[counts > 1]):
        twice = [names[image] for image in several.tolist()]
        raise DataError(
            f"{len(twice):,} of the {len(names):,} images have several rows: {first_few(twice)}",
            where=url,
            hint="name them as the data set does, with folders where file names are not enough",
        )
    return place


class _Rows:
    """Features that are put together row by row, and what is wrong with them."""

    def __init__(self, images: int, dtype: np.dtype[Any], names: Sequence[str], url: str) -> None:
        self.dtype, self.names, self.url = dtype, names, url
        self.lengths = np.full(images, -1)
        self.values: NDArray[np.floating] | None = None

    def put(self, images: NDArray[np.int64], column: pyarrow.Array) -> None:
        lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_numpy()
        self.lengths[images] = lengths
        if self.values is None:
            self.values = np.zeros((len(self.lengths), int(np.bincount(lengths).argmax())), self.dtype)
        fits = lengths == self.values.shape[1]
        flat = column.filter(pyarrow.array(fits)).flatten().to_numpy(zero_copy_only=False)
        self.values[images[fits]] = flat.astype(self.dtype).reshape(-1, self.values.shape[1])

    def complete(self) -> NDArray[np.floating]:
        """All of them. Raises DataError where some are of no use."""
        assert self.values is not None
        usual = self.values.shape[1]
        self._refuse((self.lengths != usual) | (usual == 0), f"have not {usual or 'any'} numbers as the others have")
        self._refuse(~np.isfinite(self.values).all(axis=1), "are not finite")
        return self.values

    def _refuse(self, wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            some = [self.names[image] for image in np.flatnonzero(wrong).tolist()]
            raise DataError(
                f"{len(some):,} of the {len(wrong):,} features {what}: {first_few(some)}",
                where=self.url,
                hint="make the file anew; every image of query and gallery needs one whole feature",
            )


def refuse_other(url: str, storage: StorageConfig, identity: str) -> bool:
    """Whether the file is there already, made of the same; False: there is none. Raises DataError where it is another
    one, and StorageError for an address that is no file's."""
    if not url.endswith(ENDING):
        raise StorageError("features go into a parquet file", where=url, hint=f"--out features/market1501{ENDING}")
    header = header_of(url, storage)
    if header is not None and header.get("identity") != identity:
        raise DataError("another file is already there, of other weights, data or settings", where=url,
                        hint="choose another --out, or delete it")  # fmt: skip
    return header is not None
