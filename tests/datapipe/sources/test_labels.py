"""Labels of every type and spelling are understood, or said; names survive dictionaries, backslashes and dots."""

import decimal
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from datapipe.core.config import StorageConfig
from datapipe.dataset.remarks import Remarks
from datapipe.sources import open_sources
from datapipe.sources.base import Crop
from datapipe.sources.labels import NotUnderstood, labelled, read_number

NAMES = [f"34_01_0341_{number:08d}.jpg" for number in range(4)]


def crops(url: Path) -> tuple[list[Crop], Remarks]:
    remarks = Remarks()
    (source,) = open_sources([str(url)], StorageConfig())
    return [crop for unit in list(source.units(remarks)) for crop in source.read(unit, remarks)], remarks


def pids(url: Path) -> list[int]:
    return [crop.pid for crop in crops(url)[0]]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3), (3.0, 3), ("3", 3), ("0003", 3), (" 3 ", 3), ("3.0", 3), (b"0003", 3), ("+3", 3), (-1, -1), ("-1", -1),
        (-1.0, -1), (0, 0), (np.int64(3), 3), (np.float32(3), 3), (np.array(3), 3), (decimal.Decimal("3.0"), 3),
        (None, None), (float("nan"), None), ("", None), ("NaN", None), ("None", None), ("unknown", None),
    ],
)  # fmt: skip
def test_number__of_any_type(value: Any, number: int | None) -> None:
    assert read_number("pid", value) == number


@pytest.mark.parametrize("value", [True, False, np.True_, 3.5, "3.5", "three", "c3", [3], {}, 1 << 31, 1e300,
                                   float("inf"), "9" * 60, np.array([3])])  # fmt: skip
def test_number__that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(NotUnderstood):
        read_number("pid", value)


@pytest.mark.parametrize(
    "key", ["pid", "PID", "person_id", "PersonID", "person id", "person-id", "personId", "identity"]
)
def test_label__of_any_spelling(key: str) -> None:
    assert labelled("s", "x.jpg", b"", {key: "0007", "cameraId": 2.0, "Track": 5, "frame number": 6}) == Crop(
        "s", "x.jpg", b"", 7, 2, track=5, frame=6
    )


def test_label__that_is_a_flag_is_nobody_and_said() -> None:
    crop = labelled("s", "0002_c1.jpg", b"", {"person": True, "frame": False, "camera": None})
    assert (crop.pid, crop.camera, crop.frame) == (2, 1, -1)
    assert crop.unread == ("person (true or false)", "frame (true or false)")
    assert labelled("s", "x.jpg", b"", {"person": True, "person_id": 7}).pid == 7
    assert labelled("s", "99999999999_c1.jpg", b"").unread == ("pid in names (beyond 32 bits)",)


# ---------------------------------------------------------------------------------------------------------- parquet

IMAGES = [b"one", b"two", b"three", b"four"]


def table(file: Path, **columns: Any) -> Path:
    given = {"image": pa.array(IMAGES, pa.binary())} | columns
    pyarrow.parquet.write_table(pa.table(given), file)
    return file


LABELS: list[Any] = [
    pa.array([7, 8, None, 9], kind)
    for kind in (pa.int8(), pa.int16(), pa.uint32(), pa.uint64(), pa.int64(), pa.float32(), pa.float64(),
                 pa.decimal128(8, 2))
] + [
    pa.array(["0007", "8", None, "9.0"], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())
] + [
    pa.array([b"0007", b"8", None, b"9"], pa.binary()),
    pa.array(["0007", "8", None, "9"]).dictionary_encode(),
    pa.array([7, 8, None, 9]).dictionary_encode(),
    pa.array([7.0, 8.0, float("nan"), 9.0]),
]  # fmt: skip


@pytest.mark.parametrize("column", LABELS, ids=lambda column: str(column.type))
@pytest.mark.parametrize("name", ["pid", "Person_ID"])
def test_parquet__labels_of_any_type(tmp_path: Path, column: pa.Array, name: str) -> None:
    found, remarks = crops(table(tmp_path / "x.parquet", **{name: column}))
    assert [crop.pid for crop in found] == [7, 8, -1, 9]
    assert not any(crop.unread for crop in found) and not list(remarks.lines())


@pytest.mark.parametrize("column", [pa.array([True, False, True, None]), pa.array([1.5, 2.5, 3.5, 4.5]),
                                    pa.array(["a", "b", "c", "d"]), pa.array([[1], [2], [3], [4]])])  # fmt: skip
def test_parquet__labels_that_are_none_are_said(tmp_path: Path, column: pa.Array) -> None:
    found, _ = crops(table(tmp_path / "x.parquet", pid=column))
    assert {crop.pid for crop in found} == {-1}
    assert sum(bool(crop.unread) for crop in found) == 4 - column.null_count


TEXTS = [pa.array(NAMES, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())] + [
    pa.array(NAMES).dictionary_encode(),
    pa.array(NAMES, pa.large_string()).dictionary_encode(),
    pa.array([name.encode() for name in NAMES], pa.binary()),
]


@pytest.mark.parametrize("column", TEXTS, ids=lambda column: str(column.type))
def test_parquet__names_of_any_type(tmp_path: Path, column: pa.Array) -> None:
    assert [crop.name for crop in crops(table(tmp_path / "x.parquet", path=column))[0]] == NAMES


def test_parquet__names_that_are_none_are_said(tmp_path: Path) -> None:
    found, remarks = crops(table(tmp_path / "x.parquet", path=pa.array([[name] for name in NAMES])))
    assert [crop.name for crop in found] == [f"{row:09d}" for row in range(4)]
    assert "4 names in path (list" in "".join(remarks.lines())


@pytest.mark.parametrize("column", [
    pa.array(IMAGES, pa.binary_view()), pa.array(IMAGES, pa.large_binary()),
    pa.array(IMAGES, pa.binary()).dictionary_encode(),
    pa.array([{"bytes": data, "path": name} for data, name in zip(IMAGES, NAMES, strict=True)],
             pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
], ids=lambda column: str(column.type))  # fmt: skip
def test_parquet__images_of_any_type(tmp_path: Path, column: pa.Array) -> None:
    assert [crop.data for crop in crops(table(tmp_path / "x.parquet", image=column))[0]] == IMAGES


# --------------------------------------------------------------------------------------------------- tar, zip, LMDB


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, pid: Any) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"image"), (f"{key}.json", json.dumps({"pid": pid}).encode())]


@pytest.mark.parametrize("keys", [("cam1.0001", "cam1.0002"), ("v1.0/0001", "v1.0/0002"), ("a/x.1.b", "a/x.2.b")])
def test_tar__keys_with_dots_keep_labels_and_names(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = tar(tmp_path / "x.tar", [*sample(keys[0], 7), *sample(keys[1], "0008")])
    found, _ = crops(path)
    assert {crop.name: crop.pid for crop in found} == {f"{keys[0]}.jpg": 7, f"{keys[1]}.jpg": 8}


def test_tar__counts_what_it_passes_over(tmp_path: Path) -> None:
    others = [("a.heic", b""), ("b.HEIC", b""), ("readme", b""), (".hidden", b""), ("x.verylongending1", b"")]
    _, plain = crops(tar(tmp_path / "plain.tar", [("a.jpg", b"image"), *others]))
    assert plain.passed_over == {".heic": 2, "without ending": 2}
    _, samples = crops(tar(tmp_path / "samples.tar", [*sample("1", 1), ("1.cls", b"1"), *others]))
    assert samples.passed_over == {".cls": 1, ".heic": 2, "without ending": 2}


@pytest.mark.parametrize("system", [0, 10, 11])
def test_zip__with_backslashes_of_windows(tmp_path: Path, system: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("set\\", "set\\train\\0002_c1s1_000451_03.jpg", "__MACOSX\\0002_c1s1.jpg", "set\\notes.docx"):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, system
            archive.writestr(info, b"" if name.endswith("\\") else b"image")
    found, remarks = crops(tmp_path / "x.zip")
    assert found == [Crop("x.zip", "set/train/0002_c1s1_000451_03.jpg", b"image", 2, 1)]
    assert remarks.passed_over == {".docx": 1}


@pytest.mark.parametrize("name", ["C:\\sets\\train\\0002_c1s1_000451_03.jpg", "train\\0002_c1s1_000451_03.jpg"])
def test_names__with_backslashes_tell_labels(tmp_path: Path, name: str) -> None:
    assert labelled("s", name, b"")[3:5] == (2, 1)
    assert pids(tar(tmp_path / "x.tar", [(name, b"image")])) == [2]


def lmdb_of(folder: Path, keys: Sequence[str], **pickled: Any) -> Path:
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 20) as file, file.begin(write=True) as transaction:
        for key in keys:
            transaction.put(key.encode(), b"image")
    if pickled:
        (folder / "keys.pkl").write_bytes(pickle.dumps({"keys": list(keys), **pickled}))
    return folder


def test_lmdb__keys_and_pickled_labels(tmp_path: Path) -> None:
    market = [f"000{pid}_c{pid}s1_000451_03.jpg" for pid in (2, 3, 4)]
    assert [crop[3:5] for crop in crops(lmdb_of(tmp_path / "a", market))[0]] == [(2, 2), (3, 3), (4, 4)]
    assert pids(lmdb_of(tmp_path / "b", NAMES[:3], pids=["0007", 8.0, None])) == [7, 8, -1]
    found, remarks = crops(lmdb_of(tmp_path / "c", NAMES[:3], vids=[1, 2, 3]))
    assert remarks.unread_labels == {"vids in keys.pkl": 3} and found[0].video == ""
    with pytest.raises(Exception, match="holds no list of keys"):
        crops(lmdb_of(tmp_path / "d", NAMES[:3], pids=[True, True, False]))


def test_folder__counts_what_it_passes_over(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "b.heic",
        "c.avif",
        "d.HEIC",
        "0001",
        "sub/e.7z",
        ".hidden.heic",
        "Thumbs.db",
        "@eaDir/x.heic",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found, remarks = crops(tmp_path)
    assert [crop.name for crop in found] == ["a.jpg"]
    assert remarks.passed_over == {".heic": 2, ".avif": 1, "without ending": 1, ".7z": 1}
    (line,) = remarks.lines()
    assert line == "passed over, no images by their names: 2 .heic, 1 .7z, 1 .avif, 1 without ending"
    assert Remarks.from_json(remarks.to_json()) == remarks and Remarks.from_json(b"\xff") == Remarks()
