"""Who is seen by which camera: from Market-1501-style names, and from records beside the images."""

import re
from collections.abc import Mapping
from typing import Any

from datapipe.dataset.index import INDEX
from datapipe.sources.base import UNKNOWN, Crop
from datapipe.sources.location import printable

MARKET_NAME = re.compile(r"([-\d]+)_c(\d+)")
NUMBERS = {
    "pid": ("pid", "person_id", "person"),
    "camera": ("camera", "camera_id", "camid", "cam_id"),
    "track": ("track", "track_id", "tracklet", "tracklet_id"),
    "frame": ("frame", "frame_id", "frame_number", "frame_index"),
}
"""Labels of a crop, and the keys or columns that are taken for them where they hold whole numbers that `fit`."""
WIDTHS = {label: INDEX.field(label).type.bit_width for label in NUMBERS}
RANGES = {label: range(-1 << bits - 1, 1 << bits - 1) for label, bits in WIDTHS.items()}
"""What the index can hold."""
VIDEO = ("video", "video_id", "video_name")
"""Keys or columns that are taken for the name of the video."""
LABELS = (*(key for keys in NUMBERS.values() for key in keys), *VIDEO)


def parse_market_name(name: str) -> tuple[int, int] | None:
    """(person, camera) of "0002_c1s1_000451_03.jpg" and its kin, as written: camera from 1, junk persons -1.

    Not anchored at the end, as Market-1501 has names like "1488_c3s3_015653_00.jpg.jpg".
    """
    match = MARKET_NAME.match(name.rpartition("/")[2])
    if not match:
        return None
    try:
        pid, camera = int(match[1]), int(match[2])
    except ValueError:  # "1-2_c3": digits and dashes that are no number
        return None
    return (pid, camera) if fits("pid", pid) and fits("camera", camera) else None  # "0001_c20231231": a date


def fits(label: str, number: int) -> bool:
    """Whether the index can hold it."""
    return number in RANGES[label]


def labelled(source: str, name: str, data: bytes, record: Mapping[str, Any] | None = None, problem: str = "") -> Crop:
    """A crop with the labels of its record, and with those of its name where the record is silent."""
    pid, camera = parse_market_name(name) or (UNKNOWN, UNKNOWN)
    if not record:
        return Crop(source, name, data, pid, camera, problem=problem)
    known = {label: value for label in NUMBERS if (value := _number(record, label)) is not None}
    video = next((printable(str(record[key])) for key in VIDEO if isinstance(record.get(key), str | int)), "")
    return Crop(source, name, data, **{"pid": pid, "camera": camera, **known}, video=video, problem=problem)


def _number(record: Mapping[str, Any], label: str) -> int | None:
    numbers = (record[key] for key in NUMBERS[label] if isinstance(record.get(key), int))
    return next((int(number) for number in numbers if fits(label, number)), None)
