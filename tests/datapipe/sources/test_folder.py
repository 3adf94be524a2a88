"""Folders of images are read completely, in order, with the labels of their names."""

import os
from pathlib import Path

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.sources import folder, open_sources
from datapipe.sources.base import Crop, Source
from datapipe.sources.labels import parse_market_name
from tests.conftest import S3Server


def crops(source: Source) -> list[Crop]:
    return [crop for unit in source.units() for crop in source.read(unit)]


def test_parse_market_name__knows_the_oddities() -> None:
    assert parse_market_name("0002_c1s1_000451_03.jpg") == (2, 1)
    assert parse_market_name("some/folder_c9/-1_c3s2_000451_03.jpg") == (-1, 3)
    assert parse_market_name("1488_c3s3_015653_00.jpg.jpg") == (1488, 3)
    assert parse_market_name("0005_c12_f0046182.jpg") == (5, 12)
    assert parse_market_name("holiday.jpg") is None
    assert parse_market_name("1-2_c3.jpg") is None
    assert parse_market_name("0001_c20231231.jpg") is None  # a date; cameras have 16 bits in the index
    assert parse_market_name("99999999999_c1.jpg") is None


def test_folder__finds_images_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    files = ["b/0001_c1.jpg", "a/deep/er/0002_c2s1.jpg.jpg", "UPPER.JPG", "a.png", "a/0003_c3.jpeg", "ein Bild ä.webp"]
    ignored = ["Thumbs.db", "notes.txt", ".hidden.jpg", ".folder/x.jpg", "a/.DS_Store", "a/._0003_c3.jpeg"]
    for name in files + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (source,) = open_sources([str(tmp_path)], StorageConfig())
    found = crops(source)
    assert [crop.name for crop in found] == sorted(files)
    assert all(crop.data == crop.name.encode() and crop.source == tmp_path.name for crop in found)
    assert {crop.name: (crop.pid, crop.camera) for crop in found} == {
        "b/0001_c1.jpg": (1, 1),
        "a/deep/er/0002_c2s1.jpg.jpg": (2, 2),
        "a/0003_c3.jpeg": (3, 3),
        "UPPER.JPG": (-1, -1),
        "a.png": (-1, -1),
        "ein Bild ä.webp": (-1, -1),
    }


@pytest.mark.slow
def test_folder__is_the_same_on_an_object_store(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "UNIT_CROPS", 100)
    bucket = s3.bucket()
    (tmp_path / "set").mkdir()
    for number in range(150):
        (tmp_path / "set" / f"{number % 7}_c1_{number}.jpg").write_bytes(bytes([number]))
        s3.client.put_object(Bucket=bucket, Key=f"some/set/{number % 7}_c1_{number}.jpg", Body=bytes([number]))
    (local,) = open_sources([str(tmp_path / "set")], s3.storage)
    (remote,) = open_sources([f"s3://{bucket}/some/set"], s3.storage)
    assert [unit.bytes for unit in local.units()] == [100, 50]
    assert list(local.units()) == list(remote.units())
    assert crops(local) == crops(remote)


def test_units__change_with_names_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    (source,) = open_sources([str(tmp_path)], StorageConfig())
    digests = [next(source.units()).digest]
    (tmp_path / "a.jpg").write_bytes(b"12")
    digests.append(next(source.units()).digest)
    (tmp_path / "a.jpg").rename(tmp_path / "b.jpg")
    digests.append(next(source.units()).digest)
    assert len(set(digests)) == 3


def test_labels__are_no_longer_than_it_takes(tmp_path: Path) -> None:
    for name in ("x/train", "y/train", "z/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(b"1")
    one = open_sources([f"{tmp_path}/x/train/", f"{tmp_path}/z/test"], StorageConfig())
    assert [source.label for source in one] == ["train", "test"]
    two = open_sources([f"{tmp_path}/x/train", f"{tmp_path}/y/train"], StorageConfig())
    assert [source.label for source in two] == ["x/train", "y/train"]


def test_labels__can_be_written_in_an_index(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / "a.jpg").write_bytes(b"1")
    (source,) = open_sources([str(odd)], StorageConfig())
    assert source.label == "caf\\xe9" and [crop.source for crop in crops(source)] == ["caf\\xe9"]


def test_folder__names_links_that_lead_nowhere_and_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (source,) = open_sources([str(tmp_path)], StorageConfig())
    assert [crop.data for crop in crops(source)] == [b""]
    (tmp_path / "b.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(NotFoundError, match="link leads nowhere.*\n.*b.jpg"):
        crops(source)
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(DataError, match="cannot be looked through.*\n.*self"):
        open_sources([str(tmp_path)], StorageConfig())


def test_open_sources__says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("no images here")
    (tmp_path / "file.jpg").write_bytes(b"1")
    for url, message in [("missing", "does not exist"), ("empty", "no images"), ("file.jpg", "no source of crops")]:
        with pytest.raises(DataError, match=message) as caught:
            open_sources([str(tmp_path / url)], StorageConfig())
        assert str(tmp_path / url) in str(caught.value)
    with pytest.raises(DataError, match="twice"):
        open_sources([str(tmp_path), f"{tmp_path}/"], StorageConfig())
    with pytest.raises(DataError, match="no source"):
        open_sources([], StorageConfig())


def test_folder__refuses_tars_among_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.tar"):
        (tmp_path / name).write_bytes(b"1")
    (source,) = open_sources([str(tmp_path)], StorageConfig())
    with pytest.raises(DataError, match="both archives and images"):
        list(source.units())
