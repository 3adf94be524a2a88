"""Boxes of people in the frames of a video: MOT text, or a parquet of frame, box and track."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from datapipe.core.bounds.parquet_pages import read_table as read_parquet
from datapipe.core.errors import DataError
from datapipe.formats.file_kinds import EMPTY, PARQUET, TEXT, kind_of_bytes
from datapipe.formats.text import NoText, decode_text
from datapipe.sources.base import UNKNOWN
from datapipe.sources.labels import NUMBERS, is_label, plain_key

MOT_COLUMNS = 6
"""frame, track, left, top, width, height; what follows is not needed, but for the flag of the ground truth."""
NO_LINES = np.empty((0, MOT_COLUMNS))
MOST_NUMBER = (1 << 53) - 1
"""Numbers come as floating-point ones, which hold no larger whole numbers exactly."""
BOX_LISTS = ("box", "bbox")
CORNERS = (("left", "top", "width", "height"), ("x", "y", "w", "h"), ("bb_left", "bb_top", "bb_width", "bb_height"))
OPPOSITE = ("x1", "y1", "x2", "y2")
_WHO = (*NUMBERS["pid"], *NUMBERS["camera"])


class Boxes(NamedTuple):
    """n boxes in the order of their frames."""

    frame: np.ndarray
    """int64[n], as the source numbers them."""
    track: np.ndarray
    """int64[n]; -1: unknown."""
    corners: np.ndarray
    """float64[n, 4]: left, top, right, bottom in pixels; 0, 0 is the upper left corner of the frame."""
    row: np.ndarray
    """int64[n]: where each box stood in its file, from 0."""
    first_frame: int
    """Number of a video's first frame: 1 in MOT text, 0 in parquet."""
    labels: pyarrow.Table | None = None
    """Columns that tell who is in a box and which camera sees it, one row for each of the file."""

    def record(self, box: int) -> dict[str, Any]:
        """What the file says of a box beside its place: column -> value."""
        if self.labels is None:
            return {}
        return {name: self.labels[name][int(self.row[box])].as_py() for name in self.labels.column_names}


def read_mot(data: bytes, where: str, *, truth: bool = False) -> Boxes:
    """Lines of "frame,track,left,top,width,height,...", as MOTChallenge and most trackers write them.

    `truth`: the lines are MOTChallenge's ground truth, whose seventh number 0 says that a line is not to be considered.
    """
    _refuse_others(data, where, TEXT, "no MOT text")
    try:
        text = decode_text(data).strip()
        delimiter = next((mark for mark in ",;" if mark in text), None)
        table = np.loadtxt(io.StringIO(text), delimiter=delimiter, ndmin=2) if text else NO_LINES
    except NoText as error:
        raise DataError(
            f"this is no MOT text: it {error}", where=where, hint="lines of frame,track,left,top,width,height"
        ) from error
    except ValueError as error:
        raise DataError(
            f"this is no MOT text: {error}", where=where, hint="lines of frame,track,left,top,width,height"
        ) from error
    if table.shape[1] < MOT_COLUMNS:
        raise DataError(
            f"lines have {table.shape[1]} numbers, MOT text has at least {MOT_COLUMNS}",
            where=where,
            hint="lines of frame,track,left,top,width,height",
        )
    considered = table[:, 6] != 0 if truth and table.shape[1] > MOT_COLUMNS else np.ones(len(table), bool)
    corners = np.hstack([table[:, 2:4], table[:, 2:4] + table[:, 4:6]])
    return _sorted(table[:, 0], table[:, 1], corners, considered, 1, where)


def read_table(data: bytes, where: str) -> Boxes:
    """A parquet of `frame` (the first one is 0), a box, and `track` where it is known.

    The box is a list `box` or `bbox` of left, top, width, height; or these four columns (also x, y, w, h); or x1, y1,
    x2, y2. Columns of persons and cameras, spelt as `labels.NUMBERS` has them, are the labels of the crops.
    """
    _refuse_others(data, where, PARQUET, "no parquet file")
    try:
        given = read_parquet(data)
        table = given.rename_columns([_plain(name) for name in given.column_names])
        frame = _column(table, NUMBERS["frame"])
        track = _column(table, (*NUMBERS["track"], "id"))
        corners = _corners(table)
        labels = given.select([name for name in given.column_names if plain_key(name) in _WHO]).combine_chunks()
        labels.validate(full=True)  # texts that are none
    except (pyarrow.ArrowException, ValueError, TypeError, OSError, KeyError) as error:
        raise DataError(
            f"the boxes cannot be read: {error}", where=where, hint="check the file and its columns"
        ) from error
    if frame is None or corners is None:
        raise DataError(
            f"no boxes in the columns {', '.join(table.column_names)}",
            where=where,
            hint="needed are frame, box (left, top, width, height) and, where known, track",
        )
    unknown = np.full(len(frame), UNKNOWN)
    boxes = _sorted(frame, unknown if track is None else track, corners, np.ones(len(frame), bool), 0, where)
    return boxes._replace(labels=labels if labels.column_names else None)


def _refuse_others(data: bytes, where: str, wanted: str, told: str) -> None:
    """DataError for a file that is of another kind than these boxes are."""
    kind = kind_of_bytes(data)
    if kind not in (wanted, "", *EMPTY):
        raise DataError(f"this is {told}: it is {kind}", where=where,
                        hint="MOT text is called .txt, a parquet of boxes .parquet")  # fmt: skip


def _plain(name: str) -> str:
    """Labels as they are looked for; other columns as they are called."""
    return plain_key(name) if is_label(name) else name


def _sorted(
    frame: np.ndarray, track: np.ndarray, corners: np.ndarray, taken: np.ndarray, first_frame: int, where: str
) -> Boxes:
    numbers = np.column_stack([frame, track, corners])
    if (np.abs(numbers[:, :2]) > MOST_NUMBER).any():
        raise DataError(f"a frame or a track has a number beyond {MOST_NUMBER:,}, which would be changed",
                        where=where, hint="number tracks from 1")  # fmt: skip
    if not np.isfinite(numbers).all() or (frame % 1).any() or (track % 1).any():
        raise DataError(
            "a frame or a track is no whole number, or a box no number at all", where=where, hint="correct that line"
        )
    row = np.flatnonzero(taken)
    row = row[np.argsort(frame[row], kind="stable")]
    return Boxes(frame[row].astype(np.int64), track[row].astype(np.int64), corners[row], row, first_frame)


def _column(table: pyarrow.Table, names: Sequence[str]) -> np.ndarray | None:
    name = next((name for name in names if name in table.column_names), None)
    return None if name is None else table[name].to_numpy().astype(np.float64)


def _corners(table: pyarrow.Table) -> np.ndarray | None:
    for name in BOX_LISTS:
        if name in table.column_names:
            box = np.array(table[name].to_pylist(), np.float64).reshape(-1, 4)
            return np.hstack([box[:, :2], box[:, :2] + box[:, 2:]])
    for names in (*CORNERS, OPPOSITE):
        if set(names) <= set(table.column_names):
            box = np.column_stack([table[name].to_numpy().astype(np.float64) for name in names])
            return box if names == OPPOSITE else np.hstack([box[:, :2], box[:, :2] + box[:, 2:]])
    return None
