"""A list of keys or names in a file, whoever wrote it: an editor of any system, a spreadsheet, a shell, pickle.

Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark (or with the zeros of plain letters); lines end as on any
system. A table with a heading `key` or `name` gives that column. Compressed files are unpacked.
"""

import contextlib
import csv
import re
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow

from datapipe.core.bounds.parquet_pages import open_parquet, read_table
from datapipe.core.bounds.text_trees import parse_json
from datapipe.core.bounds.unpacking import ERRORS, unpack, unpacker_of
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.plain_pickle import load_plain
from datapipe.formats.text import NoText, decode_text
from datapipe.sources.location import printable
from datapipe.storage import open_object, open_store, split_url

By = Literal["key", "name"]
NOTES, SIDECAR = b"reid_notes", ".notes.json"
"""Where a list says what binds whoever uses it, as a JSON list of sentences: in the metadata of a parquet file, or in a
file beside it, called FILE.notes.json."""
MOST_NOTES_BYTES = 1 << 20
PICKLES = (".pkl", ".pickle")
MOST_BYTES, MOST_TIMES, FREE_BYTES = 16 << 30, 30, 64 << 20
"""Of a list; and of one that is unpacked so many times its packed size, and some MB: names that count up pack well."""
LINES = re.compile(r"\r\n|\r|\n")
BLANK = " \t\v\f\u00a0\ufeff\u200b"
DELIMITERS = ",;\t"
MOST_HEADING = 10_000
"""Characters of a line that may be the heading of a table."""
HEADINGS = {"key": ("key", "keys"), "name": ("name", "names", "file", "filename", "file_name", "path", "image")}


def read_list(url: str, by: By, storage: StorageConfig) -> pyarrow.Array:
    """The keys or names in a file, as large strings in its order: text with one a line, a table with a column of that
    name (CSV, parquet), or a pickled list (TransReID-SSL's CFS_list.pkl), which is read without running what it may
    hold. Raises DataError where it is none of these, or empty."""
    folder, file = split_url(url)
    data = _unpacked(open_store(folder, storage).read_small(file, MOST_BYTES, what="the list"), url)
    if url.lower().endswith(PICKLES):
        values = _unpickled(data, url)
    elif url.lower().endswith(".parquet") or data.startswith(b"PAR1"):
        values = _column(data, by, url)
    else:
        values = _of_text(decoded(data, url), by)
    listed = pyarrow.array([printable(value) for value in values if value.strip(BLANK)], pyarrow.large_string())
    if not len(listed):
        raise DataError("the list is empty", where=url, hint=f"one {by} a line")
    return listed


def read_notes(url: str, storage: StorageConfig) -> tuple[str, ...]:
    """What a list says binds whoever uses it: see NOTES. None for most lists. Raises DataError for notes that cannot be
    read."""
    folder, file = split_url(url)
    store = open_store(folder, storage)
    found: list[bytes] = []
    if url.lower().endswith(".parquet"):
        with open_object(store, file) as source, contextlib.suppress(pyarrow.ArrowException):
            metadata = open_parquet(source).schema_arrow.metadata or {}
            found += [metadata[NOTES]] if NOTES in metadata else []
    with contextlib.suppress(NotFoundError):
        found.append(store.read_small(file + SIDECAR, MOST_NOTES_BYTES, what="the notes of a list"))
    try:
        notes = [sentence for text in found for sentence in parse_json(text)]
        return tuple(dict.fromkeys(_texts(notes)))
    except (ValueError, TypeError) as error:
        raise DataError(f"the notes of a list cannot be read: {error}", where=url,
                        hint=f"a JSON list of sentences, in the metadata or in {file}{SIDECAR}") from error  # fmt: skip


def is_remark(line: str, by: By, *, first: bool) -> bool:
    """Whether a line that is no crop is a comment, or, as the first one, a heading."""
    return re.match(r"#(\s|#|$)", line) is not None or (first and line.strip().lower() in HEADINGS[by])


def decoded(data: bytes, where: str) -> str:
    """Text in whatever encoding it tells. Bytes that are no UTF-8 stay as \\xNN, as names of files have them here.

    Raises DataError for what is no text.
    """
    try:
        return decode_text(data, errors="backslashreplace")
    except NoText as error:
        raise DataError(f"the list is no text: it {error}", where=where,
                        hint="save it as plain text (UTF-8) with one name a line, or as CSV with a heading"
                        ) from error  # fmt: skip


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _unpacked(data: bytes, where: str) -> bytes:
    parts = unpacker_of(data)
    try:
        return unpack(data, parts, FREE_BYTES + MOST_TIMES * len(data)) if parts else data
    except ERRORS as error:
        raise DataError(f"the list cannot be unpacked: {error}", where=where, hint="copy it again") from error


def _of_text(text: str, by: By) -> list[str]:
    lines = LINES.split(text)
    first = next((line for line in lines if line.strip(BLANK)), "")
    for delimiter in DELIMITERS if len(first) < MOST_HEADING else "":
        heading = [cell.strip(BLANK).lower() for cell in next(csv.reader([first], delimiter=delimiter))]
        if len(heading) > 1 and by in heading:
            place = heading.index(by)
            rows = list(csv.reader(lines, delimiter=delimiter))
            return [row[place] if len(row) > place else delimiter.join(row) for row in rows if row][1:]
    return [_unquoted(line.strip(BLANK)) for line in lines]


def _unquoted(line: str) -> str:
    """A name as a spreadsheet or a shell puts it into quotes."""
    if len(line) > 1 and line[0] == line[-1] == '"' and '"' not in line[1:-1].replace('""', ""):
        return line[1:-1].replace('""', '"')
    return line[1:-1] if len(line) > 1 and line[0] == line[-1] == "'" else line


def _column(data: bytes, by: By, url: str) -> list[str]:
    try:
        table = read_table(data, [by])
        return [_text(item) for item in table[by].to_pylist() if item is not None]
    except (pyarrow.ArrowException, KeyError, TypeError, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"the list is no parquet file with a column `{by}` of text",
            where=url,
            hint=f"or give a text file with one {by} a line",
        ) from error


def _unpickled(data: bytes, url: str) -> list[str]:
    try:
        names = load_plain(data)
        if not isinstance(names, list | tuple):
            raise TypeError(f"it is of type {type(names).__name__}")
        return _texts(names)
    except Exception as error:  # damaged pickles end in any exception there is
        raise DataError(
            f"the pickle is no plain list of names: {error}",
            where=url,
            hint="a pickled list of text, or a text file with one name a line",
        ) from error


def _texts(items: Sequence[Any]) -> list[str]:
    return [_text(item) for item in items]


def _text(item: Any) -> str:
    if isinstance(item, bytes):
        return _utf8(item)
    if not isinstance(item, str):
        raise TypeError(f"an item is of type {type(item).__name__}")
    return item
