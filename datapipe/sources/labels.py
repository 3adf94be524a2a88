"""Who is seen by which camera: from Market-1501-style names, and from records beside the images."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from datapipe.dataset.index import INDEX
from datapipe.sources.base import Crop
from datapipe.sources.location import printable

MARKET_NAME = re.compile(r"([-\d]+)_c(\d+)")
NUMBERS = {
    "pid": ("pid", "personid", "person", "identity", "identityid", "personidentity"),
    "camera": ("camera", "cameraid", "camid", "cam", "cameraindex"),
    "track": ("track", "trackid", "tracklet", "trackletid"),
    "frame": ("frame", "frameid", "framenumber", "frameindex"),
}
"""Labels of a crop, and the keys or columns that are taken for them, spelt as `plain_key` does: "person_id", "PersonID"
and "person id" are one."""
WIDTHS = {label: INDEX.field(label).type.bit_width for label in NUMBERS}
RANGES = {label: range(-1 << bits - 1, 1 << bits - 1) for label, bits in WIDTHS.items()}
"""What the index can hold."""
VIDEO = ("video", "videoid", "videoname")
"""Keys or columns that are taken for the name of the video."""
MISSING = frozenset(("", "nan", "none", "null", "na", "n/a", "unknown", "?", "-"))
"""Texts that say that there is no label."""
_LABELS = frozenset((*(key for keys in NUMBERS.values() for key in keys), *VIDEO))
_WHOLE = re.compile(r"[+-]?\d{1,40}(?:\.0*)?")


class NotUnderstood(ValueError):
    """A label is there, and is no whole number that the index can hold."""


@lru_cache(maxsize=4096)
def plain_key(key: str) -> str:
    """A key or the name of a column in the one spelling that labels are looked for by."""
    return re.sub(r"[\s_\-.]+", "", key).lower()


def is_label(key: str) -> bool:
    """Whether a key or a column is taken for a label of the crop."""
    return plain_key(key) in _LABELS


def read_number(label: str, value: Any) -> int | None:
    """A label as its whole number, whatever type it came in: 3, 3.0, "0003"; None where it says that there is none.

    Raises NotUnderstood for flags, fractions, other texts, and what the index cannot hold.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # of NumPy
        value = value.item()
    number: int | None = None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in MISSING:
            return None
        number = int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    elif isinstance(value, bool):
        raise NotUnderstood("true or false")
    elif isinstance(value, int):
        number = value
    elif isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        number = int(value) if math.isfinite(value) and value == int(value) else None
    if number is None:
        raise NotUnderstood("no whole number")
    if not fits(label, number):
        raise NotUnderstood(f"beyond {WIDTHS[label]} bits")
    return number


def market_labels(name: str) -> tuple[int, int] | None:
    """(person, camera) of "0002_c1s1_000451_03.jpg" and its kin as written, whatever fits: camera from 1, junk -1.

    Not anchored at the end, as Market-1501 has names like "1488_c3s3_015653_00.jpg.jpg". Folders may be parted by "\\".
    """
    match = MARKET_NAME.match(re.split(r"[/\\]", name)[-1])
    if not match:
        return None
    try:
        return int(match[1]), int(match[2])
    except ValueError:  # "1-2_c3": digits and dashes that are no number
        return None


def parse_market_name(name: str) -> tuple[int, int] | None:
    """`market_labels` that the index can hold; None for others, such as the date in "0001_c20231231"."""
    labels = market_labels(name)
    return labels if labels and fits("pid", labels[0]) and fits("camera", labels[1]) else None


def fits(label: str, number: int) -> bool:
    """Whether the index can hold it."""
    return number in RANGES[label]


def labelled(source: str, name: str, data: bytes, record: Mapping[str, Any] | None = None, problem: str = "") -> Crop:
    """A crop with the labels of its record, and with those of its name where the record is silent. What is there and
    cannot be understood is named in `unread`."""
    unread: list[str] = []
    numbers: dict[str, int] = {}
    if named := market_labels(name):
        of_name = dict(zip(("pid", "camera"), named, strict=True))
        unread += [f"{label} in names (beyond {WIDTHS[label]} bits)" for label in of_name
                   if not fits(label, of_name[label])]  # fmt: skip
        numbers = {} if unread else of_name  # a name like "0001_c20231231" tells something else
    video = ""
    if record:
        spelt = {plain: (key, value) for key, value in record.items() if (plain := plain_key(str(key))) in _LABELS}
        for label, keys in NUMBERS.items():
            told, faults = _number(label, [spelt[key] for key in keys if key in spelt])
            if told is not None:
                numbers[label] = told
            else:
                unread += faults
        texts = (spelt[key][1] for key in VIDEO if key in spelt)
        video = next((_video(text) for text in texts if isinstance(text, str | bytes | int)), "")
    return Crop(source, name, data, **numbers, video=video, problem=problem, unread=tuple(unread))


def _number(label: str, given: list[tuple[str, Any]]) -> tuple[int | None, list[str]]:
    """(the first of the values that is understood, why others are not)."""
    faults = []
    for key, value in given:
        try:
            if (number := read_number(label, value)) is not None:
                return number, []
        except NotUnderstood as error:
            faults.append(f"{printable(str(key))} ({error})")
    return None, faults


def _video(value: str | bytes | int) -> str:
    return printable(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value))
