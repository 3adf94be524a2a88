"""Lists of crops that users bring along: by key, or by original name as published rankings have them.

Lists come from editors, spreadsheets and shells of all systems: `read_list` says what is understood. Names are
compared in one form, on both sides: composed characters (NFC), "/" between folders, no "./", no blanks around.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.errors import DataError
from datapipe.dataset.index import whole_column
from datapipe.maintain.read_list import By, is_remark, read_list, read_notes
from datapipe.sources.location import IMAGE_ENDINGS

__all__ = ["By", "ListMatch", "look_up", "read_list", "read_notes", "refuse_ambiguous", "refuse_missing"]

FOLDERS, ENDINGS = r"^.*/", rf"(?i)(\.({'|'.join(ending[1:] for ending in IMAGE_ENDINGS)}))+$"
FOLDER = r"^[^/]*/+"
SAME_FOLDER = (r"^(\./+)+", ""), (r"/(\./+)+", "/"), (r"/{2,}", "/")
BLANKS = " \t\r\n\v\f\u00a0\u2007\u202f\u3000\u200b\u200e\u200f\u2060\ufeff"
EXAMPLES = 3
MOST_FOLDERS = 32


class ListMatch(NamedTuple):
    """Which crop is meant by which line of a list."""

    place: np.ndarray
    """int64, for each crop its place in the list; -1 where it is not listed."""
    missing: int
    """Listed crops that are nowhere."""
    examples: list[str]
    """Some of these."""
    lost: pyarrow.Array
    """All of these, as the list has them."""
    remarks: int
    """Lines that are no crop of the data set but a heading or a comment."""


def look_up(listed: pyarrow.Array, table: pyarrow.Table, by: By) -> ListMatch:
    """Find the listed crops in a table with the column `by`.

    A name that is not found is looked for without its first folders, then by its last part without ending, so that
    lists made for loose files fit other sources of the same images.
    """
    column = canonical(whole_column(table, by), by)
    wanted = canonical(listed, by)
    place, lost = _match(wanted, column)
    for form in _looser(by, wanted, column):
        if not len(lost):
            break
        names, present = form
        matched, still = _match(names.take(lost), present)
        place = np.where((place < 0) & (matched >= 0), lost[matched], place)
        lost = lost[still]
    remarks = [number for number in lost.tolist() if is_remark(listed[number].as_py(), by, first=number == 0)]
    lost = np.setdiff1d(lost, remarks)
    missing = listed.take(lost)
    return ListMatch(place, len(lost), missing.slice(0, EXAMPLES).to_pylist(), missing, len(remarks))


def canonical(names: pyarrow.Array, by: By) -> pyarrow.Array:
    """Names or keys in the form in which they are compared."""
    compute = pyarrow.compute
    if not compute.all(compute.string_is_ascii(names)).as_py():
        names = compute.utf8_normalize(names, form="NFC")
    names = compute.utf8_trim(names, characters=BLANKS)
    if _any_holds(names, "\\"):
        names = compute.replace_substring(names, pattern="\\", replacement="/")
    for pattern, replacement in SAME_FOLDER if _any_holds(names, "./") or _any_holds(names, "//") else ():
        names = compute.replace_substring_regex(names, pattern=pattern, replacement=replacement)
    return compute.utf8_lower(_bare(names)) if by == "key" else names


def refuse_ambiguous(place: np.ndarray, listed: pyarrow.Array, table: pyarrow.Table, where: str) -> int:
    """How many crops are spelt alike but for Unicode's forms and blanks, beyond the first each: all of them are meant.

    place: for each crop of the table, which has the columns `source` and `name`. Raises DataError where crops that are
    called differently, or are of different sources, have the same place in a list.
    """
    rows = np.flatnonzero(place >= 0)
    _, first, inverse, counts = np.unique(place[rows], return_index=True, return_inverse=True, return_counts=True)
    if not len(counts) or counts.max() == 1:
        return 0
    several = counts[inverse] > 1
    rows, other = rows[several], rows[first[inverse[several]]]
    names, sources = canonical(whole_column(table, "name"), "name"), whole_column(table, "source")
    alike = [
        pyarrow.compute.equal(column.take(rows), column.take(other)).to_numpy(zero_copy_only=False)
        for column in (names, sources)
    ]
    ambiguous = np.unique(place[rows[~(alike[0] & alike[1])]])
    if len(ambiguous):
        raise DataError(
            f"{len(ambiguous):,} listed names fit more than one crop, for example {listed[int(ambiguous[0])]}",
            where=where,
            hint="narrow it down to one source, or list keys instead of names",
        )
    return int((counts - 1).sum())


def refuse_missing(lookup: ListMatch, total: int, *, share: float, where: str) -> None:
    """Raises DataError where more than this share of a list is not in the data set."""
    if lookup.missing > share * (total - lookup.remarks):
        raise DataError(
            f"{lookup.missing:,} of the {total - lookup.remarks:,} listed crops are not in the data set, for example "
            f"{', '.join(lookup.examples)}",
            where=where,
            hint=f"the indexes, shards/*.parquet, list them; --max-missing above {share:g} goes on without the missing",
        )


def _any_holds(names: pyarrow.Array, part: str) -> bool:
    return bool(pyarrow.compute.any(pyarrow.compute.match_substring(names, part)).as_py())


def _looser(by: By, wanted: pyarrow.Array, column: pyarrow.Array) -> Iterator[tuple[pyarrow.Array, pyarrow.Array]]:
    """What else a listed name may be, the likeliest first: (forms of the listed, forms of the column)."""
    if by == "key":
        return
    replace = pyarrow.compute.replace_substring_regex
    shorter = wanted
    for _ in range(MOST_FOLDERS):
        if not _any_holds(shorter, "/"):
            break
        shorter = replace(shorter, pattern=FOLDER, replacement="")
        yield shorter, column
    yield _bare(wanted), _bare(column)


def _match(listed: pyarrow.Array, column: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """(for each of the column its place in the list, or -1; places in the list that the column does not have)."""
    place = pyarrow.compute.fill_null(pyarrow.compute.index_in(column, value_set=listed), -1).to_numpy()
    present = pyarrow.compute.is_in(listed, value_set=column).to_numpy(zero_copy_only=False)
    return place.astype(np.int64), np.flatnonzero(~present)


def _bare(names: pyarrow.Array) -> pyarrow.Array:
    """Last parts of names, without the endings of images."""
    replace = pyarrow.compute.replace_substring_regex
    return replace(replace(names, FOLDERS, ""), ENDINGS, "")
