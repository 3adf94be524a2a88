"""Tables are what pyarrow reads, page headers what it wrote; what unpacks to far more than the file has is refused."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datapipe.core.bounds import parquet_pages
from datapipe.core.bounds.parquet_pages import measured, open_parquet, read_table, rows_at_once

WAYS = (
    {}, {"compression": "zstd"}, {"compression": "gzip", "data_page_version": "2.0"}, {"use_dictionary": False},
    {"row_group_size": 700}, {"data_page_size": 500, "write_statistics": False}, {"compression": "none"},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "number": "DELTA_BINARY_PACKED"}},
)  # fmt: skip


def table(rows: int = 3_000) -> pyarrow.Table:
    random = np.random.default_rng(0)
    return pyarrow.table(
        {
            "text": [f"folder/{row % 40:04d}.jpg" if row % 7 else None for row in range(rows)],
            "number": random.integers(0, 1000, rows),
            "bytes": [random.bytes(row % 50) for row in range(rows)],
            "fixed": pyarrow.array([random.bytes(32) for _ in range(rows)], pyarrow.binary(32)),
            "flag": random.integers(0, 2, rows).astype(bool),
            "box": [[1.0, 2.0, float(row), 4.0] for row in range(rows)],
            "struct": [{"bytes": b"x" * (row % 9), "path": str(row % 5)} for row in range(rows)],
            "small": pyarrow.array(random.integers(0, 99, rows), pyarrow.int16()),
        }
    ).replace_schema_metadata({"a": "b"})


def written(content: pyarrow.Table, **how: object) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(content, sink, **how)
    return sink.getvalue()


@pytest.mark.parametrize("how", WAYS)
def test_table__is_what_pyarrow_reads(how: dict[str, object], tmp_path: Path) -> None:
    data = written(table(), **how)
    (tmp_path / "x.parquet").write_bytes(data)
    for columns in (None, ["number", "text"], ["struct", "box"], []):
        expected = pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=columns)
        assert read_table(data, columns).equals(expected)
        with open(tmp_path / "x.parquet", "rb") as file:
            assert read_table(file, columns).num_rows in (expected.num_rows, 3_000)


@pytest.mark.parametrize("how", WAYS)
def test_pages__have_the_sizes_that_the_footer_sums_up(how: dict[str, object]) -> None:
    """pyarrow's totals count the headers of the pages as well, some dozen bytes each, some hundred with statistics."""
    data = written(table(), **how)
    file = open_parquet(data)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    for number, path in enumerate(column.path for column in file.schema):
        pages = measured(data, file, [path])
        stated = sum(group.column(number).total_uncompressed_size for group in groups)
        values = sum(group.column(number).num_values for group in groups)
        kind = groups[0].column(number).physical_type
        width = 32 if kind == "FIXED_LEN_BYTE_ARRAY" else parquet_pages.WIDTHS[kind]
        assert 0.4 * stated <= pages.total - values * width <= stated
        assert pages.shared == ("DELTA_BYTE_ARRAY" in str(how) and path == "text")


def repeated(rows: int, size: int) -> bytes:
    """One text many times: it is in the file once."""
    values = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["n" * size])
    return written(pyarrow.table({"name": values}), compression="zstd", store_schema=False)


def test_table__of_one_long_text_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_table(repeated(1_000, 5_000))["name"].to_pylist() == ["n" * 5_000] * 1_000
    monkeypatch.setattr(parquet_pages, "FREE_TABLE_BYTES", 1 << 21)
    with pytest.raises(pyarrow.ArrowInvalid, match="of memory"):
        read_table(repeated(100_000, 50_000))
    shared = [f"{'n' * 20_000}{row}" for row in range(500)]
    packed = written(pyarrow.table({"name": shared}), use_dictionary=False, compression="zstd",
                     column_encoding={"name": "DELTA_BYTE_ARRAY"})  # fmt: skip
    assert len(packed) < 100_000
    with pytest.raises(pyarrow.ArrowInvalid, match="of memory"):
        read_table(packed)


def test_table__of_more_rows_than_it_should_have() -> None:
    data = written(pyarrow.table({"row": np.zeros(1_000_000, np.int64)}))
    assert len(data) < 20_000 and len(read_table(data, rows=1_000_000)) == 1_000_000
    with pytest.raises(pyarrow.ArrowInvalid, match="rows"):
        read_table(data, rows=999_999)
    with pytest.raises(pyarrow.ArrowInvalid, match="of memory"):
        read_table(data, most_bytes=1_000_000)


def test_pages__beyond_what_writers_make(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(pyarrow.table({"image": [bytes(50_000)]}), use_dictionary=False, compression="zstd")
    monkeypatch.setattr(parquet_pages, "MOST_PAGE_BYTES", 50_000)
    with pytest.raises(pyarrow.ArrowInvalid, match="pages of 1 MB"):
        read_table(data)


def test_rows__at_once_fit_into_memory() -> None:
    pages = parquet_pages.Pages(1 << 20, 0, False)
    sizes = {0: 256, 1 << 20: 128, 1 << 24: 8, 1 << 40: 1}
    assert {size: rows_at_once(pages._replace(largest=size), 256) for size in sizes} == sizes


@pytest.mark.parametrize("place", [-8, -5])
def test_footer__of_a_size_that_makes_no_sense(place: int) -> None:
    data = bytearray(written(table(5)))
    data[place] ^= 0xFF
    data[-5] |= 0x40
    with pytest.raises((pyarrow.ArrowException, OSError), match="footer"):
        open_parquet(bytes(data))


def test_table__of_groups_without_rows_between_others() -> None:
    """A group that a writer was given an empty table for has a dictionary, and no page of data."""
    table, sink = pyarrow.table({"text": ["a", "b", "a"], "number": [1, 2, 3]}), pyarrow.BufferOutputStream()
    with pyarrow.parquet.ParquetWriter(sink, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)
    assert read_table(sink.getvalue().to_pybytes()) == table


def column_of_other_levels() -> bytes:
    """A column that is said to have no nulls, with statistics of one that may have some."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([1, None, 3], pyarrow.int64())}), sink)
    data = sink.getvalue().to_pybytes()
    optional, required = b"\x25\x02\x18\x01x", b"\x25\x00\x18\x01x"  # repetition_type, name
    assert data.count(optional) == 1
    return data.replace(optional, required)


def test_open__histograms_that_do_not_fit_their_columns_are_refused(tmp_path: Path) -> None:
    """pyarrow ends the process there, which a newer one may mend: then this check can go."""
    data = column_of_other_levels()
    with pytest.raises(pyarrow.ArrowInvalid, match="what its footer says of the column x is damaged"):
        read_table(data)
    (tmp_path / "x.parquet").write_bytes(data)
    ask = "import sys, pyarrow.parquet as p; p.ParquetFile(sys.argv[1]).metadata.row_group(0).column(0)"
    ended = subprocess.run([sys.executable, "-c", ask, str(tmp_path / "x.parquet")], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGABRT and b"histogram size mismatch" in ended.stderr


@pytest.mark.parametrize("place", ["both", "schema", "column"])
def test_open__names_that_are_no_text_are_refused(place: str) -> None:
    """A name stands in the schema and with each column of a row group."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"a_name": [1, 2]}), sink, store_schema=False)
    before, first, between, *after = sink.getvalue().to_pybytes().split(b"a_name")
    names = {"both": (b"a\xffname",) * 2, "schema": (b"a\xffname", b"a_name"), "column": (b"a_name", b"a\xffname")}
    data = before + names[place][0] + first + names[place][1] + b"a_name".join([between, *after])
    with pytest.raises(pyarrow.ArrowInvalid):
        read_table(data)


@pytest.mark.parametrize("nested", [False, True])
def test_open__footers_of_sound_files_are_understood(nested: bool) -> None:
    """Several groups, lists, structs, nulls, statistics and pages with an index."""
    rows = [{"a": [1, 2], "b": {"c": "x", "d": None}}, {"a": [], "b": None}, {"a": None, "b": {"c": "y", "d": 2.0}}] * 9
    table = pyarrow.Table.from_pylist(rows) if nested else pyarrow.table({f"c{n}": range(20) for n in range(30)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=4, write_page_index=True)
    assert open_parquet(sink.getvalue().to_pybytes()).read().equals(table)
