"""Crops cut from videos are those that Pillow cuts from the frames cv2 decodes; every box is accounted for."""

import io
import shutil
import struct
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.sources import open_sources
from datapipe.sources.base import Crop
from tests.conftest import S3Server
from tests.datapipe.sources.read_source import crops, units

HEIGHT, WIDTH, FRAMES = 96, 128, 12
BOXES = np.array(
    [  # frame (from 1), track, left, top, width, height
        [3, 7, 10, 20, 30, 60],
        [1, 7, 8, 20, 30, 60],
        [1, 9, 60, 5, 25, 50],
        [12, 9, 100, 40, 60, 80],
        [5, 7, -12, -8, 40, 50],
        [3, 8, 50, 30, 24, 40],
    ]
)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Smooth moving pictures, RGB."""
    random = np.random.default_rng(0)
    large = cv2.resize(
        random.integers(0, 256, (12, 16, 3), dtype=np.uint8), (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC
    )
    return [np.ascontiguousarray(large[4 * number :][:HEIGHT, 5 * number :][:, :WIDTH]) for number in range(FRAMES)]


def write_video(path: Path, frames: list[np.ndarray], codec: str = "ffv1", pixels: str = "bgr0") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_mot(path: Path, boxes: np.ndarray, tail: str = ",1,-1,-1,-1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(f"{number:g}" for number in row) + tail + "\n" for row in boxes))


def write_table(path: Path, boxes: np.ndarray) -> None:
    pyarrow.parquet.write_table(
        pa.table(
            {
                "frame": boxes[:, 0].astype(int),
                "track": boxes[:, 1].astype(int),
                "box": pa.array(boxes[:, 2:].tolist(), pa.list_(pa.float32())),
            }
        ),
        path,
    )


def cut_by_others(video: Path, boxes: np.ndarray) -> dict[int, Image.Image]:
    """Crop of each row: frames by cv2, cut by Pillow."""
    capture = cv2.VideoCapture(str(video))
    decoded = []
    while (answer := capture.read())[0]:
        decoded.append(Image.fromarray(answer[1][..., ::-1]))
    found = {}
    for row, (frame, _, left, top, width, height) in enumerate(boxes.tolist()):
        box = (max(left, 0), max(top, 0), min(left + width, WIDTH), min(top + height, HEIGHT))
        found[row] = decoded[frame - 1].crop(box)
    return found


def compare(found: list[Crop], expected: dict[int, Image.Image]) -> None:
    """Against what Pillow makes of the same pixels; a box that is one pixel off differs by more than 4."""
    rows = [int(crop.name.rpartition("_")[2].removesuffix(".jpg")) for crop in found]
    assert sorted(rows) == sorted(expected)
    for row, crop in zip(rows, found, strict=True):
        image = Image.open(io.BytesIO(crop.data))
        assert image.format == "JPEG" and image.size == expected[row].size and not crop.problem
        encoded = io.BytesIO()
        expected[row].save(encoded, "JPEG", quality=95, subsampling="4:2:0")
        difference = np.asarray(image).astype(float) - np.asarray(Image.open(encoded))
        assert np.abs(difference).mean() < 2


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("x.mkv", "ffv1", "bgr0"), ("x.mp4", "libx264", "yuv420p"), ("x.avi", "mpeg4", "yuv420p")],
    ids=["lossless", "h264", "mpeg4"],
)
def test_video__with_mot_text(tmp_path: Path, frames: list[np.ndarray], name: str, codec: str, pixels: str) -> None:
    write_video(tmp_path / name, frames, codec, pixels)
    write_mot(tmp_path / "x.txt", BOXES)
    found = crops(f"{tmp_path}/{name}")
    assert [(crop.frame, crop.track) for crop in found] == [(1, 7), (1, 9), (3, 7), (3, 8), (5, 7), (12, 9)]
    assert found[0].name == f"{name}/000001_0000001.jpg" and found[-1].name == f"{name}/000012_0000003.jpg"
    assert {(crop.source, crop.video, crop.pid, crop.camera) for crop in found} == {(name, name, -1, -1)}
    compare(found, cut_by_others(tmp_path / name, BOXES))


@pytest.mark.parametrize("turn", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)], ids=["90", "180", "270"])
def test_video__of_a_turned_phone_is_upright(
    tmp_path: Path, frames: list[np.ndarray], turn: tuple[int, int, int, int]
) -> None:
    write_video(tmp_path / "x.mp4", frames, "libx264", "yuv420p")
    data = (tmp_path / "x.mp4").read_bytes()
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # first of the film, then of the track
    a, b, c, d = (number << 16 for number in turn)
    place = data.index(straight, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "x.mp4").write_bytes(data[:place] + turned + data[place + len(turned) :])
    boxes = np.array([[3, 1, 10, 20, 30, 40], [4, 1, 50, 10, 30, 60]])
    write_mot(tmp_path / "x.txt", boxes)
    compare(crops(f"{tmp_path}/x.mp4"), cut_by_others(tmp_path / "x.mp4", boxes))


def test_video__crops_are_encoded_once_at_the_quality_asked_for(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    write_mot(tmp_path / "x.txt", BOXES[:1])
    for quality in (95, 50):
        (source,) = open_sources([f"{tmp_path}/x.mkv"], StorageConfig(), jpeg_quality=quality)
        (unit,) = source.units()
        (crop,) = source.read(unit)
        reference = io.BytesIO()
        Image.fromarray(frames[2][20:80, 10:40]).save(reference, "JPEG", quality=quality, subsampling="4:2:0")
        image, expected = Image.open(io.BytesIO(crop.data)), Image.open(reference)
        assert image.quantization == expected.quantization  # type: ignore[attr-defined]
        assert [part[1:3] for part in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
        assert np.abs(np.asarray(image).astype(float) - np.asarray(expected)).mean() < 1


def test_video__with_a_table_counts_frames_from_0(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    boxes = BOXES - np.array([1, 0, 0, 0, 0, 0])
    write_table(tmp_path / "x.parquet", boxes)
    found = crops(f"{tmp_path}/x.mkv")
    assert [(crop.frame, crop.track) for crop in found] == [(0, 7), (0, 9), (2, 7), (2, 8), (4, 7), (11, 9)]
    compare(found, cut_by_others(tmp_path / "x.mkv", BOXES))
    left, top, width, height = boxes[:, 2:].T
    columns = {"x1": left, "y1": top, "x2": left + width, "y2": top + height}
    pyarrow.parquet.write_table(pa.table({"frame": boxes[:, 0], **columns}), tmp_path / "x.parquet")
    others = crops(f"{tmp_path}/x.mkv")
    assert [crop.data for crop in others] == [crop.data for crop in found] and {crop.track for crop in others} == {-1}


def test_video__persons_and_cameras_of_a_table_are_labels(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    boxes = BOXES - np.array([1, 0, 0, 0, 0, 0])
    columns = {"frame": boxes[:, 0], "bbox": boxes[:, 2:].tolist(), "track": boxes[:, 1]}
    people = ["0012", "7", None, "guest", "-1", "3"]
    labels = {"Person_ID": people, "cam id": [4.0, 4.0, 4.0, 4.0, 4.0, float("nan")], "score": [0.5] * 6}
    pyarrow.parquet.write_table(pa.table(columns | labels), tmp_path / "x.parquet")
    found = {crop.name.rpartition("_")[2]: crop for crop in crops(f"{tmp_path}/x.mkv")}
    found_of = [found[f"{row:07d}.jpg"] for row in range(6)]
    assert [crop.pid for crop in found_of] == [12, 7, -1, -1, -1, 3]
    assert [crop.camera for crop in found_of] == [4, 4, 4, 4, 4, -1]
    assert [crop.track for crop in found_of] == boxes[:, 1].tolist()
    assert [crop.unread for crop in found_of] == [(), (), (), ("Person_ID (no whole number)",), (), ()]


def test_boxes__of_another_kind_are_named(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames[:1])
    (tmp_path / "x.parquet").write_text("frame,track,left,top,width,height\n0,1,2,3,4,5\n")
    with pytest.raises(DataError, match="no parquet file: it is a text"):
        crops(f"{tmp_path}/x.mkv")


def test_boxes__whose_persons_are_no_text_are_refused(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames[:1])
    no_text = pa.array([b"\xff3"]).view(pa.string())
    columns = {"frame": [0], "bbox": [[1.0, 2.0, 9.0, 9.0]], "pid": no_text}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the boxes cannot be read"):
        crops(f"{tmp_path}/x.mkv")


def write_sequence(folder: Path, frames: list[np.ndarray]) -> None:
    (folder / "img1").mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / "img1" / f"{number:06d}.jpg", quality=95)
    (folder / "seqinfo.ini").write_text("[Sequence]\nname=x\nimDir=img1\nframeRate=25\nseqLength=12\nimExt=.jpg\n")


def test_sequence__as_motchallenge_lays_it_out(tmp_path: Path, frames: list[np.ndarray], s3: S3Server) -> None:
    """The ground truth goes before the detections, and its lines flagged 0 are not to be considered."""
    root = tmp_path / "MOT" / "train"
    for name in ("MOT-02", "MOT-04"):
        write_sequence(root / name, frames)
        write_mot(root / name / "det" / "det.txt", BOXES, ",0.3")
    write_mot(root / "MOT-02" / "gt" / "gt.txt", BOXES[:2], ",1,1,1")
    with open(root / "MOT-02" / "gt" / "gt.txt", "a") as file:
        file.write("2,4,10,10,20,20,0,3,1\n")
    found = crops(f"{tmp_path}/MOT")
    assert [crop.name for crop in found][:3] == [
        "train/MOT-02/000001_0000001.jpg",
        "train/MOT-02/000003_0000000.jpg",
        "train/MOT-04/000001_0000001.jpg",
    ]
    assert len(found) == 2 + len(BOXES) and {crop.video for crop in found} == {"train/MOT-02", "train/MOT-04"}
    compare(
        found[2:],
        {
            row: Image.fromarray(frames[frame - 1]).crop(
                (max(left, 0), max(top, 0), min(left + width, WIDTH), min(top + height, HEIGHT))
            )
            for row, (frame, _, left, top, width, height) in enumerate(BOXES.tolist())
        },
    )
    bucket = s3.bucket()
    for path in root.rglob("*.*"):
        s3.client.upload_file(str(path), bucket, f"MOT/{path.relative_to(tmp_path / 'MOT')}")
    assert crops(f"s3://{bucket}/MOT", s3.storage) == found
    (alone,) = units(f"{root}/MOT-04")
    assert alone[1].video == "MOT-04" and len(crops(f"{root}/MOT-04")) == len(BOXES)


def test_video__folder_is_the_same_on_an_object_store(tmp_path: Path, frames: list[np.ndarray], s3: S3Server) -> None:
    bucket = s3.bucket()
    for name in ("a/1.mp4", "b/1.mp4"):
        write_video(tmp_path / "set" / name, frames, "libx264", "yuv420p")
    write_mot(tmp_path / "set" / "a" / "1.txt", BOXES)
    write_table(tmp_path / "set" / "b" / "1.parquet", BOXES[:3])
    for path in (tmp_path / "set").rglob("*.*"):
        s3.client.upload_file(str(path), bucket, str(path.relative_to(tmp_path)))
    local, remote = units(f"{tmp_path}/set"), units(f"s3://{bucket}/set", s3.storage)
    assert [unit.digest for _, unit in local] == [unit.digest for _, unit in remote] and len(local) == 2
    found = crops(f"{tmp_path}/set")
    assert found == crops(f"s3://{bucket}/set", s3.storage)
    assert {crop.name.rpartition("/")[0] for crop in found} == {"a/1.mp4", "b/1.mp4"}
    assert crops(f"s3://{bucket}/set/a/1.mp4", s3.storage)[0].data == found[0].data


def test_box__without_a_frame_is_an_error(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    for frame in (0, FRAMES + 1):
        write_mot(tmp_path / "x.txt", np.vstack([BOXES, [frame, 1, 5, 5, 20, 20]]))
        with pytest.raises(DataError, match=f"boxes in frame {frame}, the video has frames 1 to {FRAMES}") as caught:
            crops(f"{tmp_path}/x.mkv")
        assert caught.value.where == f"{tmp_path}/x.txt"
    write_sequence(tmp_path / "sequence", frames)
    write_mot(tmp_path / "sequence" / "det" / "det.txt", np.array([[13, -1, 5, 5, 20, 20]]))
    with pytest.raises(DataError, match="boxes in frame 13"):
        crops(f"{tmp_path}/sequence")


def test_box__outside_the_frame_is_reported(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    write_mot(tmp_path / "x.txt", np.array([[1, 1, 500, 5, 20, 20], [1, 2, 5, 5, 0, 20], [1, 3, 5.4, 5.6, 20, 20]]))
    outside, empty, sound = crops(f"{tmp_path}/x.mkv")
    assert outside.problem == empty.problem == "the box lies outside the frame" and outside.data == b""
    assert Image.open(io.BytesIO(sound.data)).size == (20, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n", "at least 6"),
        ("1,2,a,4,5,6\n", "no MOT text"),
        ("1.5,2,3,4,5,6\n", "whole number"),
        ("1,2,nan,4,5,6\n", "no number"),
        ('{"boxes": [[1, 2, 3, 4]]}', "no MOT text: it is JSON"),
        ("<!DOCTYPE html><html>", "no MOT text: it is an HTML page"),
    ],
    ids=["short", "letters", "half a frame", "nan", "json", "html"],
)
def test_boxes__that_are_none_are_refused(tmp_path: Path, frames: list[np.ndarray], text: str, message: str) -> None:
    write_video(tmp_path / "x.mkv", frames[:1])
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        crops(f"{tmp_path}/x.mkv")
    assert caught.value.where == f"{tmp_path}/x.txt"


def test_video__without_boxes_or_sense_is_refused(tmp_path: Path, frames: list[np.ndarray]) -> None:
    write_video(tmp_path / "x.mkv", frames)
    with pytest.raises(DataError, match="no boxes for the video") as caught:
        crops(str(tmp_path))
    assert "x.txt or x.parquet" in caught.value.hint
    (tmp_path / "x.txt").write_text("")
    assert crops(str(tmp_path)) == []
    write_mot(tmp_path / "x.txt", BOXES)
    (tmp_path / "x.mkv").write_bytes(b"no video at all" * 100)
    with pytest.raises(DataError, match="cannot be decoded"):
        crops(str(tmp_path))
    (tmp_path / "photo.jpg").write_bytes(b"1")
    with pytest.raises(DataError, match="both videos and images"):
        crops(str(tmp_path))
    shutil.rmtree(tmp_path)


def test_video__of_an_unknown_codec_is_refused(tmp_path: Path, frames: list[np.ndarray]) -> None:
    """Matroska names codecs in words; one that FFmpeg has no decoder for leaves the stream without any."""
    write_video(tmp_path / "x.mkv", frames[:2])
    write_table(tmp_path / "x.parquet", BOXES[:1] - np.array([1, 0, 0, 0, 0, 0]))
    data = (tmp_path / "x.mkv").read_bytes()
    assert data.count(b"V_FFV1") == 1
    (tmp_path / "x.mkv").write_bytes(data.replace(b"V_FFV1", b"V_XYZ1"))
    with pytest.raises(DataError, match="cannot be decoded"):
        crops(f"{tmp_path}/x.mkv")
