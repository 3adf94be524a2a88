"""Parquet files that others wrote: footers, pages and dictionaries are measured before pyarrow unpacks them.

A footer may say anything of the pages; each page states by itself how many bytes and values it unpacks to, and pyarrow
makes room for as many. So the headers of the pages are read here first (Apache Parquet's `parquet.thrift`, in Thrift's
compact protocol): at most some dozen bytes of each. What goes beyond the limits is a `pyarrow.ArrowInvalid`, as damage
is.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

FREE_FOOTER_BYTES, FILE_PER_FOOTER = 4 << 20, 64
"""A footer has so many bytes at most, and beyond these one for so many of the file: it takes 30 times its size in
memory."""
MOST_PAGE_BYTES = 1 << 27
"""Of a page that is unpacked. Writers end one at 1 MB, some at 100 MB."""
BATCH_BYTES = 1 << 27
"""Values of a column that may be in memory at a time where rows are read in batches."""
FREE_TABLE_BYTES, TABLE_TIMES = 1 << 28, 16
"""A table that is read as a whole takes so many bytes of memory, and beyond these so many times its file."""
LARGE_GROUP_BYTES, BUFFER_BYTES = 1 << 28, 8 << 20
"""Of larger row groups so much is read at a time, of smaller ones all."""
FREE_ROWS, BYTES_A_ROW = 1_000_000, 16
"""Rows that a file of images may have: so many, and beyond these one for so many of its bytes."""
MOST_HEADER_BYTES, FIRST_HEADER_BYTES = 16 << 20, 1 << 10
DICTIONARY_PAGE, DELTA_BYTE_ARRAY = 2, 7
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
"""Bytes of a value in memory, beside its own of a BYTE_ARRAY."""


class Pages(NamedTuple):
    """What some columns of some row groups unpack to."""

    largest: int
    """Bytes of the largest page or dictionary of columns of bytes or text."""
    total: int
    """Bytes of all pages, and of all values of fixed width."""
    shared: bool
    """Values of a page may have their beginnings in common, and take far more than its bytes."""


Source = bytes | BinaryIO
Wanted = dict[int, Any]
"""Fields of a struct that are wanted, by their numbers, each with those of the structs in it."""
DEEPEST = 12
"""How far structs and lists may lie within one another: footers have seven."""
_COLUMN_FACTS: Wanted = {4: {1: {8: {}, 3: {3: {0: {}}, 16: {1: {}, 2: {0: {}}, 3: {0: {}}}}}}}
"""FileMetaData.row_groups -> columns -> crypto_metadata, meta_data.path_in_schema and size_statistics."""


def open_parquet(source: Source) -> pyarrow.parquet.ParquetFile:
    """A file whose footer is of a size that makes sense, and says nothing of a column that ends pyarrow's process when
    it is asked for. Raises ArrowInvalid."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    footer = int.from_bytes(tail[:4], "little")
    if tail[4:] in (b"PAR1", b"PARE") and footer > FREE_FOOTER_BYTES + size // FILE_PER_FOOTER:
        raise pyarrow.ArrowInvalid(f"its footer is said to have {footer:,} bytes, of {size:,} in all")
    opened = _opened(source)
    file.seek(max(0, size - 8 - footer))
    _check_columns(file.read(footer), opened.schema)
    file.seek(0)
    return opened


def _opened(source: Source, *, read_dictionary: Sequence[str] = ()) -> pyarrow.parquet.ParquetFile:
    if not isinstance(source, bytes):
        source.seek(0)
    try:
        return pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(source) if isinstance(source, bytes) else source, read_dictionary=list(read_dictionary)
        )
    except UnicodeDecodeError as error:
        raise pyarrow.ArrowInvalid(f"a column's name is no text: {error}") from error


def _check_columns(footer: bytes, schema: pyarrow.parquet.ParquetSchema) -> None:
    """Raises ArrowInvalid for columns that are encrypted, and for histograms of other sizes than their columns have
    levels: pyarrow's C++ throws for both where nothing catches it. And for names that are no text."""
    try:
        groups = _Compact(footer).struct(wanted=_COLUMN_FACTS).get(4) or []
        for group in groups:
            for number, chunk in enumerate(group.get(1) or []):
                column, about = schema.column(number), chunk.get(3) or {}
                sizes = about.get(16) or {}
                for part in about.get(3) or ():
                    part.decode()
                levels = ((2, column.max_repetition_level), (3, column.max_definition_level)) if sizes else ()
                if (8 in chunk or any(len(sizes.get(field) or ()) not in (0, most + 1) for field, most in levels)
                        or (1 in sizes and column.physical_type != "BYTE_ARRAY")):  # fmt: skip
                    raise pyarrow.ArrowInvalid(f"what its footer says of the column {column.path} is damaged, or it is "
                                               "encrypted")  # fmt: skip
    except (IndexError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise pyarrow.ArrowInvalid(f"its footer is damaged: {error}") from error


def measured(
    source: Source,
    file: pyarrow.parquet.ParquetFile,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
) -> Pages:
    """What the columns (paths, or what they begin with; None: all) unpack to. Raises ArrowInvalid for a page beyond
    MOST_PAGE_BYTES, and for what are no pages."""
    read = _reader(source)
    largest = total = 0
    shared = False
    metadata = file.metadata
    for group in range(metadata.num_row_groups) if groups is None else groups:
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if columns is not None and not _is_of(chunk.path_in_schema, columns):
                continue
            kind = file.schema.column(number)
            width = kind.length if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" else WIDTHS[chunk.physical_type]
            for header in _headers(read, chunk):
                size, values = header[2], _values(header)
                total += size + values * width
                if chunk.physical_type == "BYTE_ARRAY":
                    largest = max(largest, size)
                    shared = shared or _encoding(header) == DELTA_BYTE_ARRAY
    return Pages(largest, total, shared)


def rows_at_once(pages: Pages, most: int) -> int:
    """Rows of a batch, at most `most`: that many times the largest page, or dictionary, fits into BATCH_BYTES."""
    return max(1, min(most, BATCH_BYTES // max(1, pages.largest)))


def refuse_large(total: int, size: int) -> None:
    """Raises ArrowInvalid where values that are read as a whole take far more than their file has bytes."""
    _refuse_large(total, _most(size))


def _most(size: int) -> int:
    return FREE_TABLE_BYTES + TABLE_TIMES * size


def refuse_many_rows(rows: int, size: int) -> None:
    """Raises ArrowInvalid where a file of images of so many bytes has more rows than images fit into it."""
    if rows > FREE_ROWS + size // BYTES_A_ROW:
        raise pyarrow.ArrowInvalid(f"it is said to have {rows:,} rows in {size:,} bytes")


def read_table(
    source: Source, columns: Sequence[str] | None = None, *, rows: int | None = None, most_bytes: int | None = None
) -> pyarrow.Table:
    """A whole table, or some of its columns, in their own types.

    `rows`: how many it must have. `most_bytes`: of the table in memory; by default as FREE_TABLE_BYTES and TABLE_TIMES
    say. Raises ArrowInvalid, and KeyError for a column that is not there.
    """
    size = len(source) if isinstance(source, bytes) else source.seek(0, 2)
    most = _most(size) if most_bytes is None else most_bytes
    file = open_parquet(source)
    if rows is not None and file.metadata.num_rows != rows:
        raise pyarrow.ArrowInvalid(f"it has {file.metadata.num_rows:,} rows, not {rows:,}")
    names = file.schema_arrow.names if columns is None else list(columns)
    if not names:
        return file.read(columns=[])  # as many rows as it has, of nothing
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in names])
    pages = measured(source, file, names)
    _refuse_large(pages.total, most)
    texts = [field.name for field in schema if _is_text(field.type)] if not pages.shared else []
    file = _opened(source, read_dictionary=texts)
    careful = pages.shared or any(pyarrow.types.is_nested(field.type) for field in schema)
    batches, taken = [], 0
    for batch in file.iter_batches(rows_at_once(pages, 1 << 16) if careful else 1 << 16, columns=names):
        taken += sum(_plain_bytes(column) for column in batch.columns)
        _refuse_large(taken, most)
        batches.append(batch.select(names).cast(schema.remove_metadata()))
    table = pyarrow.Table.from_batches(batches, schema.remove_metadata())
    if table.num_rows != file.metadata.num_rows:
        raise pyarrow.ArrowInvalid(f"it has {table.num_rows:,} rows and should have {file.metadata.num_rows:,}")
    return table.replace_schema_metadata(file.schema_arrow.metadata).combine_chunks()


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise pyarrow.ArrowInvalid(f"its values would take {size:,} bytes of memory, more than the {most:,} that a "
                                   "table of its size may take")  # fmt: skip


def _plain_bytes(column: pyarrow.Array) -> int:
    """Bytes of a column whose dictionary is written out."""
    if not pyarrow.types.is_dictionary(column.type) or not _is_text(column.type.value_type):
        return int(column.nbytes)
    lengths = pyarrow.compute.binary_length(column.dictionary).cast(pyarrow.int64())
    return 4 * len(column) + (pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0)


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _is_of(path: str, columns: Sequence[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


# ------------------------------------------------------------------------------------------------------- page headers


def _reader(source: Source) -> Callable[[int, int], bytes]:
    if isinstance(source, bytes):
        return lambda place, size: source[place : place + size]

    def read(place: int, size: int) -> bytes:
        source.seek(place)
        return source.read(size)

    return read


def _headers(read: Callable[[int, int], bytes], chunk: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[dict[int, Any]]:
    """The headers of a column's pages, its dictionary first, each checked. Fields by their numbers."""
    place = chunk.data_page_offset
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    if dictionary and (dictionary < place or not place):  # 0: a group without rows has no page of data
        place = dictionary
    end = place + chunk.total_compressed_size
    while place < end:
        header, size = _header(read, place)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or min(unpacked, packed) < 0:
            raise pyarrow.ArrowInvalid(f"a page of {chunk.path_in_schema} states no size")
        if unpacked > MOST_PAGE_BYTES:
            raise pyarrow.ArrowInvalid(f"a page of {chunk.path_in_schema} unpacks to {unpacked:,} bytes, more than "
                                       f"{MOST_PAGE_BYTES:,}: write the file with pages of 1 MB")  # fmt: skip
        yield header
        place += size + packed


def _header(read: Callable[[int, int], bytes], place: int) -> tuple[dict[int, Any], int]:
    """(fields of the header that begins here, its bytes)."""
    size = FIRST_HEADER_BYTES
    while True:
        data = read(place, size)
        try:
            parser = _Compact(data)
            return parser.struct(), parser.place
        except IndexError:
            if len(data) < size or size > MOST_HEADER_BYTES:
                raise pyarrow.ArrowInvalid("a page has no header, or one that does not end") from None
            size *= 16


def _values(header: dict[int, Any]) -> int:
    """How many there are in a page of data; a dictionary's lie in memory as its bytes do."""
    about = header.get(5) or header.get(8) or {}
    number = about.get(1, 0) if isinstance(about, dict) else 0
    if not isinstance(number, int) or number < 0:
        raise pyarrow.ArrowInvalid("a page states no number of values")
    return number


def _encoding(header: dict[int, Any]) -> Any:
    first, second = header.get(5), header.get(8)
    return first.get(2) if isinstance(first, dict) else second.get(4) if isinstance(second, dict) else None


class _Compact:
    """Thrift's compact protocol: structs as dicts of numbers and lists, everything else passed over."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int = 0, wanted: Wanted | None = None) -> dict[int, Any]:
        """`wanted`: the fields to keep, and which of the structs in them; None: all."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kept = wanted is None or number in wanted
            value = self._value(head & 15, depth, None if wanted is None else wanted.get(number, {}))
            if kept:
                fields[number] = value
        return fields

    def _values(self, depth: int, wanted: Wanted | None) -> list[Any]:
        head = self._byte()
        kind, count = head & 15, head >> 4 if head >> 4 < 15 else self._varint()
        found = []
        for _ in range(count):
            value = self._byte() if kind in (1, 2) else self._value(kind, depth + 1, wanted)
            if wanted is None or wanted:
                found.append(value)
        return found

    def _value(self, kind: int, depth: int, wanted: Wanted | None = None) -> Any:
        if kind in (1, 2):  # true and false have no bytes of their own
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._pass(8)
        if kind == 8:
            size, start = self._varint(), self.place
            self._pass(size)
            return self.data[start : self.place]
        if kind in (9, 10) and depth < DEEPEST:
            return self._values(depth, wanted)
        if kind == 12 and depth < DEEPEST:
            return self.struct(depth + 1, wanted)
        raise pyarrow.ArrowInvalid("a header or the footer holds what none has")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _pass(self, size: int) -> None:
        self.place += size
        if self.place > len(self.data):
            raise IndexError

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise pyarrow.ArrowInvalid("a page's header holds a number that is none")

    def _integer(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)
