"""Parquet files with a column of images: their bytes, or a struct of bytes and path as Hugging Face writes it."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from datapipe.core.bounds.parquet_pages import (
    BUFFER_BYTES,
    FREE_TABLE_BYTES,
    LARGE_GROUP_BYTES,
    measured,
    open_parquet,
    refuse_many_rows,
    rows_at_once,
)
from datapipe.core.bounds.unpacking import MOST_TIMES
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.remarks import Remarks
from datapipe.formats.file_kinds import EMPTY, LOOKED_AT, PARQUET, kind_of_bytes, other_hint
from datapipe.sources.base import UNIT_BYTES, UNIT_CROPS, Crop
from datapipe.sources.labels import is_label, labelled
from datapipe.sources.location import TABLE_ENDINGS, TABLES, Location, SourceFile, list_files
from datapipe.storage import open_object, open_store

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "data", "content")
NAME_COLUMNS = ("path", "name", "file_name", "filename", "key", "__key__", "image_path", "id")
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ParquetUnit:
    """Some row groups of a file."""

    folder: str
    file: str
    groups: tuple[int, ...]
    first_row: int
    image: str
    """Column of the images."""
    name: str
    """Column of the names, "image.path" of a struct; empty: the number of the row is the name."""
    repeated: bool
    """Names are not unique in the file, or missing: the number of the row is put behind them."""
    prefix: str
    """Put before the names: files of one source may use the same ones."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class ParquetSource:
    """One file, a folder of them, or a pattern."""

    UNDERSTANDS = f"a parquet file ({', '.join(TABLE_ENDINGS)}) with a column of images, or a folder of such files"

    url: str
    label: str
    storage: StorageConfig

    @classmethod
    def at(cls, place: Location) -> "ParquetSource | None":
        return cls(place.url, place.label, place.storage) if TABLES in place.kinds else None

    def units(self, remarks: Remarks | None = None) -> Iterator[ParquetUnit]:
        for file in list_files(self.url, self.storage, TABLES, remarks):
            with self._opened(file.folder, file.name) as (opened, table):
                refuse_many_rows(table.metadata.num_rows, file.size)
                prefix = "" if file.url == self.url or file.name == self.url else f"{file.name}/"
                yield from _units(opened, table, file, prefix, remarks)

    def read(self, unit: ParquetUnit, remarks: Remarks | None = None) -> Iterator[Crop]:
        row, given = unit.first_row, 0
        with self._opened(unit.folder, unit.file) as (file, table):
            names = dict.fromkeys(table.schema_arrow.names)
            columns = [unit.image, *(name for name in names if name == unit.name or is_label(name))]
            columns = list(dict.fromkeys(columns))
            most = rows_at_once(measured(file, table, columns, unit.groups), ROWS_AT_ONCE)
            if unit.bytes > LARGE_GROUP_BYTES:
                table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
            for batch in table.iter_batches(most, row_groups=unit.groups, columns=columns):
                for record in batch.to_pylist():
                    crop = self._crop(record, row, unit)
                    given += len(crop.data)
                    if given > FREE_TABLE_BYTES + MOST_TIMES * unit.bytes:
                        what = f"its images, of {unit.bytes:,} bytes, unpack to more than {given:,}: no images do that"
                        raise pyarrow.ArrowInvalid(what)
                    yield crop
                    row += 1
            rows = sum(table.metadata.row_group(group).num_rows for group in unit.groups)
            if row - unit.first_row != rows:
                raise pyarrow.ArrowInvalid(f"it has {row - unit.first_row:,} rows where {rows:,} should be")

    def _crop(self, record: dict[str, Any], row: int, unit: ParquetUnit) -> Crop:
        image = record[unit.image]
        if not isinstance(image, dict):
            image = {"bytes": image}
        given = image.get("path") if unit.name == f"{unit.image}.path" else record.get(unit.name)
        text = given.decode("utf-8", "surrogateescape") if isinstance(given, bytes) else str(given)
        name = f"{row:09d}" if not unit.name else f"{text if given else ''}#{row}" if unit.repeated else text
        data = image["bytes"]
        problem = f"a path without bytes: {image.get('path')}" if image.get("path") else "an empty cell"
        return labelled(self.label, unit.prefix + name, data or b"", record, problem=problem if data is None else "")

    @contextmanager
    def _opened(self, folder: str, name: str) -> Iterator[tuple[BinaryIO, pyarrow.parquet.ParquetFile]]:
        store = open_store(folder, self.storage)
        try:
            with open_object(store, name) as file, open_parquet(file) as table:
                yield file, table
        except (pyarrow.ArrowException, OSError) as error:
            kind = kind_of_bytes(store.read(name, start=0, size=LOOKED_AT))
            if kind not in ("", PARQUET, *EMPTY):
                what = f"this is no parquet file: {kind}"
                raise DataError(what, where=store.address(name), hint=other_hint(kind)) from error
            raise DataError(
                f"the parquet file cannot be read: {error}",
                where=store.address(name),
                hint="it was cut or damaged: copy it again, or leave it out",
            ) from error


def _units(
    opened: BinaryIO, table: pyarrow.parquet.ParquetFile, file: SourceFile, prefix: str, remarks: Remarks | None
) -> Iterator[ParquetUnit]:
    image = find_image_column(table.schema_arrow, file.url)
    name = find_name_column(table.schema_arrow, image)
    if remarks is not None:
        for column in _unread_names(table.schema_arrow, image, name):
            remarks.unread_labels[f"names in {column}"] += table.metadata.num_rows
    repeated = bool(name) and not _are_names(opened, table, name)
    groups: list[int] = []
    first = row = size = total = 0
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        groups.append(number)
        row += group.num_rows
        packed = sum(
            group.column(i).total_compressed_size
            for i in range(group.num_columns)
            if group.column(i).path_in_schema.split(".")[0] == image
        )
        size, total = size + packed, total + packed
        if packed < 0 or total > file.size:
            raise pyarrow.ArrowInvalid(f"its images are said to take {total:,} of its {file.size:,} bytes")
        if row - first >= UNIT_CROPS or size >= UNIT_BYTES or number == table.num_row_groups - 1:
            facts = repr((file.name, file.size, groups, first, size))
            digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
            yield ParquetUnit(file.folder, file.name, tuple(groups), first, image, name, repeated, prefix, size, digest)
            groups, first, size = [], row, 0


def find_image_column(schema: pyarrow.Schema, where: str) -> str:
    """The column of the images: by its usual names, or the only one of bytes. Raises DataError."""
    binary_columns = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in binary_columns]
    if len(binary_columns) != 1 and not named:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"no column is known to hold the images; there are {columns}",
            where=where,
            hint=f"call one of bytes, or of struct{{bytes, path}}, {' or '.join(IMAGE_COLUMNS[:2])}",
        )
    return (named or binary_columns)[0]


def find_name_column(schema: pyarrow.Schema, image: str) -> str:
    """The column of the names, "image.path" for that of a struct; empty where there is none."""
    present = [name for name in NAME_COLUMNS if name in schema.names and name != image]
    named = [name for name in present if _holds_names(schema.field(name).type)]
    if named:
        return named[0]
    kind = schema.field(image).type
    return f"{image}.path" if pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0 else ""


def _unread_names(schema: pyarrow.Schema, image: str, name: str) -> list[str]:
    """Columns called as those of names are, where none of them was taken: "path (list<element: string>)"."""
    if name and not name.startswith(f"{image}."):
        return []
    others = (schema.field(column) for column in NAME_COLUMNS if column in schema.names and column != image)
    return [f"{field.name} ({field.type})" for field in others if not _holds_bytes(field.type)]


def _holds_names(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _holds_names(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(is_text or types.is_integer(kind) or _is_binary(kind))


def _is_binary(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return _holds_bytes(kind.value_type) if pyarrow.types.is_dictionary(kind) else _is_binary(kind)


def _are_names(opened: BinaryIO, table: pyarrow.parquet.ParquetFile, column: str) -> bool:
    """Whether each row has a name of its own. Takes 8 bytes a row."""
    hashes: list[np.ndarray] = []
    most = rows_at_once(measured(opened, table, [column]), 1 << 16)
    for batch in table.iter_batches(most, columns=[column]):
        values: Sequence[Any] = batch.to_struct_array().flatten()[0].to_pylist()
        names = [value.get("path") if isinstance(value, dict) else value for value in values]
        if None in names:
            return False
        texts = (name if isinstance(name, bytes) else str(name).encode() for name in names)
        hashes.append(np.array([xxhash.xxh3_64_intdigest(text) for text in texts], np.uint64))
    return not hashes or len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes))
