"""Tars that the webdataset library and GNU tar wrote are read completely, or refused."""

import bz2
import gzip
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.sources import open_sources
from datapipe.sources.base import Crop
from tests.conftest import S3Server

WriteCrops = Callable[..., dict[str, bytes]]


def read(url: str, storage: StorageConfig = StorageConfig()) -> list[Crop]:  # noqa: B008
    (source,) = open_sources([url], storage)
    return [crop for unit in source.units() for crop in source.read(unit)]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Three samples as others write them: image, labels as JSON, class."""
    path = tmp_path / "set" / "000.tar"
    path.parent.mkdir()
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "0007_c2s1_01", "jpg": b"one", "cls": 7})
        writer.write({"__key__": "people/x", "jpg": b"two", "json": {"pid": 12, "camid": 3}})
        writer.write({"__key__": "y", "left.PNG": b"three", "right.png": b"four", "json": ["no", "labels"]})
    return path


def test_shards__give_images_names_and_labels(tar: Path) -> None:
    assert read(str(tar)) == [
        Crop("000.tar", "0007_c2s1_01.jpg", b"one", 7, 2),
        Crop("000.tar", "people/x.jpg", b"two", 12, 3),
        Crop("000.tar", "y.left.PNG", b"three", unread=("JSON that is no object but a list",)),
        Crop("000.tar", "y.right.png", b"four", unread=("JSON that is no object but a list",)),
    ]


def test_shards__take_all_labels_from_the_record_and_then_from_the_name(tmp_path: Path) -> None:
    record = {"person_id": 3, "track": 5, "frame_id": 6, "video": "v.mp4", "camera": "left"}
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "0007_c2s1_01", "jpg": b"one", "json": record})
    assert read(f"{tmp_path}/x.tar") == [
        Crop("x.tar", "0007_c2s1_01.jpg", b"one", 3, 2, "v.mp4", 5, 6, unread=("camera (no whole number)",))
    ]


def test_shards__labels_that_no_index_holds_are_unknown(tmp_path: Path) -> None:
    record = {"pid": 1 << 31, "camera": 1 << 15, "track": 1 << 63, "frame": 1 << 62, "video": "\ud800 1"}
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "0007_c2s1_01", "jpg": b"one", "json": record})
    assert read(f"{tmp_path}/x.tar") == [
        Crop("x.tar", "0007_c2s1_01.jpg", b"one", 7, 2, "\\ud800 1", -1, 1 << 62,
             unread=("pid (beyond 32 bits)", "camera (beyond 16 bits)", "track (beyond 64 bits)"))
    ]  # fmt: skip


def test_shards__of_one_source_may_use_the_same_names(tar: Path, s3: S3Server) -> None:
    (tar.parent / "001.tar").write_bytes(tar.read_bytes())
    bucket = s3.bucket()
    for path in tar.parent.iterdir():
        s3.client.upload_file(str(path), bucket, f"set/{path.name}")
    folder = read(str(tar.parent))
    assert [crop.name for crop in folder][::4] == ["000.tar/0007_c2s1_01.jpg", "001.tar/0007_c2s1_01.jpg"]
    assert len({crop.name for crop in folder}) == 8 and {crop.source for crop in folder} == {"set"}
    assert [crop.name for crop in read(f"{tar.parent}/{{000..001}}.tar")] == [crop.name for crop in folder]
    assert read(f"s3://{bucket}/set", s3.storage) == folder
    with pytest.raises(NotFoundError):
        read(f"{tar.parent}/{{000..002}}.tar")


def test_shards__read_what_gnu_tar_wrote(tmp_path: Path, write_crops: WriteCrops) -> None:
    crops = write_crops(tmp_path / "crops", 12)
    for options, name in (("-cf", "plain.tar"), ("-czf", "packed.tar.gz")):
        subprocess.run(["tar", options, str(tmp_path / name), "-C", str(tmp_path / "crops"), "."], check=True)
        found = read(str(tmp_path / name))
        assert {crop.name.removeprefix("./"): crop.data for crop in found} == crops


@pytest.mark.parametrize("kept", [512 + 512, 512 + 100, 512 + 512 + 512 + 512, 700, 0])
def test_shards__refuse_a_tar_that_was_cut(tar: Path, kept: int) -> None:
    """Within a member, and between two: there the library itself sees nothing wrong."""
    tar.write_bytes(tar.read_bytes()[:kept])
    with pytest.raises(DataError, match="cut") as caught:
        read(str(tar))
    assert str(tar) in caught.value.where


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_shards__refuse_a_cut_or_broken_archive(tar: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(tar.read_bytes())
    for number, data in enumerate((packed[:-20], packed[:200], packed[:20] + bytes(300))):
        path = tar.parent.parent / f"{number}.tgz"
        path.write_bytes(data)
        with pytest.raises(DataError, match="read to its end"):
            read(str(path))


def test_shards__refuse_a_broken_header(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[1024:1030] = b"\xff" * 6
    tar.write_bytes(data)
    with pytest.raises(DataError, match="read to its end"):
        read(str(tar))
