"""Files that are not what their names say: read where that is possible, else an error that says what they are."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from datapipe.core.errors import DataError
from tests.datapipe.sources.read_source import crops

PAGE = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head>" + b"x" * 3000
ZSTD = b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 10


def packed(data: bytes) -> bytes:
    """In gzip, without the time: names of tests are the same in all processes."""
    return gzip.compress(data, mtime=0)


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number in range(3):
            member = tarfile.TarInfo(f"000{number}_c1_{number}.jpg")
            member.size = 5
            archive.addfile(member, io.BytesIO(b"image"))
    return sink.getvalue()


def packed_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("0001_c1.jpg", b"image")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.tar.gz", tar()),
        ("x.tgz", tar()),
        ("x.tar", packed(tar())),
        ("x.tar.gz", packed(tar())),
        ("x.tar.bz2", bz2.compress(tar())),
        ("x.tbz2", bz2.compress(tar())),
        ("x.tbz", bz2.compress(tar())),
        ("x.tar.xz", lzma.compress(tar())),
        ("x.txz", lzma.compress(tar(), preset=9)),
        ("x.tar.gz", lzma.compress(tar())),
        ("x.TAR.XZ", tar()),
        ("x.tar.bz2", bz2.compress(tar()[:1000]) + bz2.compress(tar()[1000:])),  # as pbzip2 writes it
    ],
)
def test_tar__is_read_as_its_bytes_say(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert [crop.pid for crop in crops(f"{tmp_path}/{name}")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (PAGE, "an HTML page"), (b"\n\n" + PAGE, "an HTML page"), (ZSTD, "compressed by zstd"),
        (lzma.compress(tar(), lzma.FORMAT_ALONE), "LZMA"),
        (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "object store"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(64), "7z"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(64), "RAR"), (b"Too many requests\n", "a text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.parquet"])
def test_archive__of_another_kind_is_named(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=told) as raised:
        crops(f"{tmp_path}/{name}")
    assert "cut" not in str(raised.value) and "copy it again" not in raised.value.hint


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.zip", tar(), "no zip: a tar"),
        ("x.zip", packed(tar()), "no zip: compressed by gzip"),
        ("x.zip", bz2.compress(tar()), "no zip: compressed by bzip2"),
        ("x.parquet", lzma.compress(tar()), "compressed by xz"),
        ("x.tar.xz", lzma.compress(PAGE), "compressed by xz, but no tar in it: an HTML page"),
        ("x.tar", packed_zip(), "no tar: a zip"),
        ("x.tar.gz", packed_zip(), "no tar: a zip"),
        ("x.tar.gz", packed(packed(tar())), "no tar in it: compressed by gzip"),
        ("x.tgz", packed(PAGE), "no tar in it: an HTML page"),
        ("x.tar.gz", packed(b"\xff\xd8\xff" + bytes(2000)), "no tar in it: a JPEG"),
    ],
)
def test_archive__of_the_other_kind_is_named(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=told):
        crops(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.parquet"])
@pytest.mark.parametrize("data", [b"", bytes(4000)])
def test_archive__that_is_empty_is_cut(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    if name.startswith("x.tar") and data:
        assert not crops(f"{tmp_path}/{name}")  # the end of a tar, and nothing before it
    else:
        with pytest.raises(DataError, match="cut|cannot be read"):
            crops(f"{tmp_path}/{name}")
