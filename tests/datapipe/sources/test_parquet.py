"""Tables of images that pyarrow wrote are read row by row, under their own names or row numbers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from datapipe.core.errors import DataError
from datapipe.sources import parquet
from datapipe.sources.base import Crop
from tests.conftest import S3Server
from tests.datapipe.sources.read_source import crops, units

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, columns: dict[str, Any], *, rows_per_group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=rows_per_group)


def images(names: list[str | None]) -> pa.Array:
    """As Hugging Face writes a column of images."""
    return pa.array([{"bytes": f"image {row}".encode(), "path": name} for row, name in enumerate(names)], STRUCT)


def test_parquet__with_plain_bytes_and_labels(tmp_path: Path) -> None:
    write(
        tmp_path / "x.parquet",
        {
            "file_name": ["a.jpg", "0007_c2_b.jpg"],
            "jpg": [b"one", b"two"],
            "person_id": [3, None],
            "camid": [1, None],
            "track_id": [5, 6],
            "frame": [10, 11],
            "video": ["v", None],
            "other": [b"x", b"y"],
        },
    )
    first, second = crops(f"{tmp_path}/x.parquet")
    assert first == Crop("x.parquet", "a.jpg", b"one", 3, 1, "v", 5, 10)
    assert second == Crop("x.parquet", "0007_c2_b.jpg", b"two", 7, 2, "", 6, 11)


def test_parquet__as_hugging_face_writes_it(tmp_path: Path) -> None:
    names = [f"{row}.jpg" for row in range(10)]
    write(tmp_path / "x.parquet", {"label": list(range(10)), "image": images(names)})
    found = crops(f"{tmp_path}/x.parquet")
    assert [(crop.name, crop.data) for crop in found] == [(name, f"image {name[0]}".encode()) for name in names]
    assert {crop.pid for crop in found} == {-1}


def test_parquet__rows_without_names_of_their_own_are_numbered(tmp_path: Path) -> None:
    write(tmp_path / "repeated.parquet", {"image": images(["a.jpg", "b.jpg", "a.jpg", "c.jpg", "d.jpg", "e.jpg"])})
    assert [crop.name for crop in crops(f"{tmp_path}/repeated.parquet")][:3] == ["a.jpg#0", "b.jpg#1", "a.jpg#2"]
    write(tmp_path / "missing.parquet", {"image": images(["a.jpg", None])})
    assert [crop.name for crop in crops(f"{tmp_path}/missing.parquet")] == ["a.jpg#0", "#1"]
    write(tmp_path / "none.parquet", {"image": [b"0", b"1", b"2", b"3", b"4", b"5"]})
    assert [crop.name for crop in crops(f"{tmp_path}/none.parquet")][::5] == ["000000000", "000000005"]


def test_parquet__cells_without_bytes_are_reported(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": None, "path": "away/a.jpg"}, None, {"bytes": b"b", "path": "b.jpg"}], STRUCT)
    write(tmp_path / "x.parquet", {"image": cells, "key": ["a", "b", "c"]})
    away, empty, sound = crops(f"{tmp_path}/x.parquet")
    assert away.problem == "a path without bytes: away/a.jpg" and empty.problem == "an empty cell"
    assert sound.data == b"b" and not sound.problem


def test_parquet__folder_is_cut_at_row_groups_and_is_the_same_on_an_object_store(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "UNIT_CROPS", 8)
    bucket = s3.bucket()
    for name in ("train/0.parquet", "train/1.parquet"):
        write(tmp_path / "set" / name, {"image": images([f"{row}.jpg" for row in range(20)])})
        s3.client.upload_file(f"{tmp_path}/set/{name}", bucket, f"set/{name}")
    url = f"s3://{bucket}/set"
    assert [unit.groups for _, unit in units(url, s3.storage)] == [(0, 1), (2, 3), (4,)] * 2
    local = crops(f"{tmp_path}/set")
    assert local == crops(url, s3.storage)
    assert [crop.name for crop in local] == [f"train/{file}.parquet/{row}.jpg" for file in (0, 1) for row in range(20)]
    assert [unit.digest for _, unit in units(f"{tmp_path}/set")] == [unit.digest for _, unit in units(url, s3.storage)]
    assert len({unit.digest for _, unit in units(url, s3.storage)}) == 6
    assert crops(f"{tmp_path}/set/train/{{0..1}}.parquet")[20].name == "1.parquet/0.jpg"


def test_parquet__without_a_column_of_images_is_refused(tmp_path: Path) -> None:
    for name, columns in {"none": {"a": [1]}, "two": {"a": [b"1"], "b": [b"2"]}}.items():
        write(tmp_path / f"{name}.parquet", columns)
        with pytest.raises(DataError, match="no column is known to hold the images; there are a: ") as caught:
            crops(f"{tmp_path}/{name}.parquet")
        assert caught.value.where == f"{tmp_path}/{name}.parquet"


def test_parquet__that_was_cut_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"image": images(["a.jpg"])})
    data = (tmp_path / "x.parquet").read_bytes()
    for kept in (0, 10, len(data) - 5):
        (tmp_path / "x.parquet").write_bytes(data[:kept])
        with pytest.raises(DataError, match="cannot be read"):
            crops(f"{tmp_path}/x.parquet")
    broken = data.replace(b"image 0", b"image 1", 1)
    (tmp_path / "x.parquet").write_bytes(broken[:4] + b"\xff" * 20 + broken[24:])
    with pytest.raises(DataError, match="cannot be read"):
        crops(f"{tmp_path}/x.parquet")
