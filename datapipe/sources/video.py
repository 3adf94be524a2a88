"""Videos and boxes of the people in them: the crops are cut here, and encoded once.

Boxes lie beside "x.mp4" as "x.txt" (MOT text) or "x.parquet". MOTChallenge's sequences are understood as well: frames
in img1, boxes in gt/gt.txt, or else in det/det.txt.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
import simplejpeg

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.remarks import Remarks
from datapipe.formats.image_formats import MOST_PIXELS
from datapipe.formats.images import Undecodable, decode_image
from datapipe.sources.base import Crop
from datapipe.sources.labels import labelled
from datapipe.sources.location import (
    ARCHIVES,
    BOX_ENDINGS,
    IMAGES,
    TABLE_ENDINGS,
    VIDEO_ENDINGS,
    VIDEOS,
    Location,
    file_urls,
    is_hidden,
    is_image,
    kind_of,
    list_entries,
    printable,
)
from datapipe.sources.video_boxes import Boxes, read_mot, read_table
from datapipe.storage import Entry, Store, open_object, open_store, split_url

FRAMES, TRUTH, DETECTIONS = "img1/", "gt/gt.txt", "det/det.txt"
FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "h264", "hevc", "m4v")
"""What FFmpeg may take a file for, by its content. Others (playlists, lists of files, session descriptions) read other
files, or the network."""
OPENED = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none", "enable_drefs": "0"}
"""FFmpeg gets the bytes of the file from us and opens nothing by itself, be it what a film refers to."""
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


@dataclass(frozen=True)
class VideoUnit:
    """One video, or one sequence of frames."""

    folder: str
    """Url of the folder below which the names are."""
    video: str
    """What the video is called in the index."""
    file: str
    """The video; empty for a sequence."""
    frames: str
    """Folder of the frames of a sequence, with a slash at its end."""
    boxes: str
    bytes: int
    digest: str


class Frame(NamedTuple):
    """A decoded frame."""

    number: int
    pixels: np.ndarray
    """uint8[height, width, 3], RGB."""
    problem: str
    """Why it is not to be used; empty otherwise."""


@dataclass(frozen=True)
class VideoSource:
    """A video, or a folder of videos and sequences at any depth, each with its boxes.

    Crops are called "VIDEO/FFFFFF_RRRRRRR.jpg", by the frame and by the row of the box in its file, from 0.
    """

    UNDERSTANDS = (
        f"a video ({', '.join(VIDEO_ENDINGS)}) with its boxes beside it under the same name "
        f"({', '.join(BOX_ENDINGS)}), a MOTChallenge sequence ({FRAMES}, {TRUTH} or {DETECTIONS}), or a "
        "folder of either"
    )

    url: str
    label: str
    storage: StorageConfig
    jpeg_quality: int

    @classmethod
    def at(cls, place: Location) -> "VideoSource | None":
        has_sequence = any(f"/{name}".endswith((f"/{TRUTH}", f"/{DETECTIONS}")) for name in place.names)
        if VIDEOS in place.kinds or (place.is_folder and has_sequence):
            return cls(place.url, place.label, place.storage, place.jpeg_quality)
        return None

    def units(self, remarks: Remarks | None = None) -> Iterator[VideoUnit]:
        files = file_urls(self.url, self.storage)
        for folder, name in map(split_url, files):
            store = open_store(folder, self.storage)
            stem = name.rpartition(".")[0]
            beside = [f"{stem}{ending}" for ending in BOX_ENDINGS if store.exists(f"{stem}{ending}")]
            yield from _pair(folder, self.label, [Entry(each, store.size(each)) for each in (name, *beside)])
        if not files:
            above, entries = list_entries(self.url, self.storage)
            yield from _pair(above, self.label, entries, remarks)

    def read(self, unit: VideoUnit, remarks: Remarks | None = None) -> Iterator[Crop]:
        store = open_store(unit.folder, self.storage)
        data, where = store.read(unit.boxes), store.address(unit.boxes)
        if unit.boxes.lower().endswith(TABLE_ENDINGS):
            boxes = read_table(data, where)
        else:
            boxes = read_mot(data, where, truth=f"/{unit.boxes}".endswith(f"/{TRUTH}"))
        wanted = np.unique(boxes.frame)
        frames = self._sequence(unit, wanted) if unit.frames else self._video(unit, wanted, boxes.first_frame)
        for frame in frames:
            for box in range(*np.searchsorted(boxes.frame, [frame.number, frame.number + 1])):
                yield self._crop(unit, frame, boxes, box)

    def _crop(self, unit: VideoUnit, frame: Frame, boxes: Boxes, box: int) -> Crop:
        height, width, _ = frame.pixels.shape
        left, top, right, bottom = np.rint(boxes.corners[box].clip(0, (width, height, width, height))).astype(int)
        outside = "" if left < right and top < bottom else "the box lies outside the frame"
        problem = frame.problem or outside
        data = (
            b""
            if problem
            else simplejpeg.encode_jpeg(
                np.ascontiguousarray(frame.pixels[top:bottom, left:right]),
                quality=self.jpeg_quality,
                colorspace="RGB",
                colorsubsampling="420",
            )
        )
        name = f"{unit.video}/{frame.number:06d}_{boxes.row[box]:07d}.jpg"
        crop = labelled(self.label, name, data, boxes.record(box), problem)
        return crop._replace(video=printable(unit.video), track=int(boxes.track[box]), frame=frame.number)

    def _video(self, unit: VideoUnit, wanted: np.ndarray, first: int) -> Iterator[Frame]:
        """The wanted frames; all up to the last of them are decoded, once and in order."""
        store = open_store(unit.folder, self.storage)
        remaining, number = list(wanted[::-1]), first - 1
        try:
            with (
                open_object(store, unit.file) as file,
                av.open(file, "r", options=OPENED, metadata_errors="replace") as container,
            ):
                codec = container.streams.video[0].codec_context
                if codec is None:
                    raise _undecodable(LookupError("no decoder knows what its frames are packed by"), store, unit.file)
                codec.thread_count = 1  # other processes decode other videos
                codec.options = {"max_pixels": str(MOST_PIXELS)}
                for number, frame in enumerate(container.decode(video=0) if remaining else (), start=first):
                    if number == remaining[-1]:
                        remaining.pop()
                        yield Frame(number, _upright(frame), "damaged frame" * frame.is_corrupt)
                    if not remaining:
                        return
        except (av.FFmpegError, IndexError) as error:
            raise _undecodable(error, store, unit.file) from error
        if remaining:
            raise DataError(
                f"there are boxes in frame {remaining[-1]}, the video has frames {first} to {number}",
                where=store.address(unit.boxes),
                hint="are they of this very video? frames count from 1 in MOT text, from 0 in parquet",
            )

    def _sequence(self, unit: VideoUnit, wanted: np.ndarray) -> Iterator[Frame]:
        """The wanted frames of a folder of images whose names are the numbers."""
        store = open_store(unit.folder, self.storage)
        stems = ((entry.name, entry.name[len(unit.frames) :].partition(".")[0]) for entry in store.list(unit.frames))
        names = {int(stem): name for name, stem in stems if stem.isdecimal() and is_image(name)}
        for number in wanted.tolist():
            if number not in names:
                raise DataError(
                    f"there are boxes in frame {number}, which is not in {unit.frames}",
                    where=store.address(unit.boxes),
                    hint="copy the frames again; they count from 1",
                )
            try:
                yield Frame(number, decode_image(store.read(names[number])), "")
            except Undecodable as error:
                yield Frame(number, NO_PIXELS, f"the frame cannot be decoded: {error}")


def _undecodable(error: Exception, store: Store, file: str) -> DataError:
    where = store.address(file)
    start = store.read(file, start=0, size=256)
    if start and not CONTROL.search(start):
        return DataError("the video cannot be decoded: it is a text, a playlist perhaps, which is not followed",
                         where=where, hint="give the videos themselves")  # fmt: skip
    if isinstance(error, av.ArgumentError):
        return DataError(f"the video cannot be decoded: it is of none of the formats {', '.join(FORMATS)}",
                         where=where, hint="convert it: ffmpeg -i FILE -c copy FILE.mkv")  # fmt: skip
    return DataError(f"the video cannot be decoded: {error}", where=where,
                     hint="it was cut or damaged: copy it again, or leave it out")  # fmt: skip


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB as players and cv2 show it, which is what boxes were drawn on: phones only note how they were held."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


class _Footage:
    """A video or a sequence, as its files are listed."""

    def __init__(self, file: str, frames: str, boxes: list[str]) -> None:
        self.file, self.frames = file, frames
        self.boxes = boxes  # where they may lie, the best place first
        self.bytes, self.digest = 0, hashlib.sha256()

    def add(self, entry: Entry) -> None:
        self.bytes += entry.size
        self.digest.update(f"{entry.name}\0{entry.size}\0".encode("utf-8", "surrogateescape"))


def _pair(folder: str, label: str, entries: Iterable[Entry], remarks: Remarks | None = None) -> Iterator[VideoUnit]:
    """Videos and sequences with their boxes; `label` is the name of a sequence that is the folder itself."""
    footage_of_video: dict[str, _Footage] = {}
    beside: dict[str, Entry] = {}
    for entry in entries:
        kind = kind_of(entry.name)
        root, is_frame, _ = f"/{entry.name}".rpartition(f"/{FRAMES}")
        if kind == VIDEOS:
            stem = entry.name.rpartition(".")[0]
            footage_of_video[entry.name] = _Footage(entry.name, "", [f"{stem}{ending}" for ending in BOX_ENDINGS])
            footage_of_video[entry.name].add(entry)
        elif kind == IMAGES and is_frame:
            places = [f"{root}/{name}".removeprefix("/") for name in (FRAMES, TRUTH, DETECTIONS)]
            footage_of_video.setdefault(root.removeprefix("/") or label, _Footage("", places[0], places[1:])).add(entry)
        elif kind in (IMAGES, ARCHIVES):
            raise DataError(
                f"the folder holds both videos and {kind}",
                where=f"{folder}/{entry.name}",
                hint="give them as separate sources, each in a folder of its own",
            )
        elif entry.name.lower().endswith(BOX_ENDINGS):
            beside[entry.name] = entry
        elif remarks is not None and not is_hidden(entry.name):
            remarks.pass_over(entry.name)
    for name, footage in sorted(footage_of_video.items()):
        boxes = next((beside[place] for place in footage.boxes if place in beside), None)
        if boxes is None:
            raise DataError(
                "there are no boxes for the video",
                where=f"{folder}/{name}",
                hint=f"put them there as {' or '.join(footage.boxes)}",
            )
        footage.add(boxes)
        yield VideoUnit(
            folder, name, footage.file, footage.frames, boxes.name, footage.bytes, footage.digest.hexdigest()
        )
