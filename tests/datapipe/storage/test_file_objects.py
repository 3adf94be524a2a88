"""Objects as files: what zipfile, tarfile, pyarrow and random jumps read is what is there."""

import io
import random
import tarfile
import zipfile
from uuid import uuid4

import pyarrow
import pyarrow.parquet
import pytest

from datapipe.core.errors import NotFoundError, StorageError
from datapipe.storage import Store, file_objects, open_object, open_store, open_stream
from tests.conftest import S3Server

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture(params=["local", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: object, s3: S3Server) -> Store:
    url = {"local": str(tmp_path), "s3": f"s3://{s3.bucket()}/set", "memory": f"memory://{uuid4().hex}"}[request.param]
    return open_store(url, s3.storage)


@pytest.mark.slow
def test_open_object__reads_and_jumps_as_a_file_does(store: Store) -> None:
    store.replace("name", DATA)
    draw, whole = random.Random(1), io.BytesIO(DATA)
    with open_object(store, "name", block=400_000) as file:
        assert file.seekable() and file.readable() and not file.writable()
        for _ in range(150):
            place = draw.choice([draw.randrange(len(DATA) + 9), whole.tell(), len(DATA) - draw.randrange(1, 99)])
            assert file.seek(place) == whole.seek(place)
            size = draw.choice([0, 1, 4_096, 100_000, 1_000_000])
            assert file.read(size) == whole.read(size) and file.tell() == whole.tell()
        assert file.seek(-5, io.SEEK_END) == len(DATA) - 5 and file.read() == DATA[-5:]
        file.seek(7)
        assert file.read() == DATA[7:]
        with pytest.raises(OSError, match="before the beginning"):
            file.seek(-1)


def test_open_object__reads_in_order_with_few_large_requests(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.bucket()
    store = open_store(f"s3://{bucket}", s3.storage)
    store.replace("name", DATA)
    monkeypatch.setattr(file_objects, "FIRST_BYTES", 10_000)
    asked: list[tuple[int, int]] = []
    read = type(store).read

    def noted(self: Store, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        asked.append((start, size or 0))
        return read(self, name, start=start, size=size)

    monkeypatch.setattr(type(store), "read", noted)
    with open_object(store, "name", block=1_000_000) as file:
        assert b"".join(iter(lambda: file.read(30_000), b"")) == DATA
    assert sorted(asked) == asked and sum(size for _, size in asked) == len(DATA)  # each byte once
    assert [size for _, size in asked][:4] == [10_000, 40_000, 40_000, 160_000] and len(asked) < 12


def test_open_object__serves_zip_tar_and_parquet(store: Store) -> None:
    members = {f"{row:03d}.bin": DATA[row * 999 : row * 1999] for row in range(40)}
    packed, taped, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive, tarfile.open(fileobj=taped, mode="w") as tape:
        for name, data in members.items():
            archive.writestr(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tape.addfile(member, io.BytesIO(data))
    pyarrow.parquet.write_table(pyarrow.table({"data": list(members.values())}), table, row_group_size=7)
    for name, made in (("a.zip", packed), ("a.tar", taped), ("a.parquet", table)):
        store.replace(name, made.getvalue())
    with zipfile.ZipFile(open_object(store, "a.zip")) as archive:
        assert {name: archive.read(name) for name in reversed(archive.namelist())} == members
    with tarfile.open(fileobj=open_object(store, "a.tar")) as tape:
        found = {member.name: tape.extractfile(member) for member in tape}
        assert {name: file.read() for name, file in found.items() if file} == members
    with pyarrow.parquet.ParquetFile(open_object(store, "a.parquet")) as file:
        assert file.read_row_group(3)["data"].to_pylist() == list(members.values())[21:28]


def test_open_object__names_what_is_absent_or_became_shorter(store: Store) -> None:
    with pytest.raises(NotFoundError):
        open_object(store, "name")
    store.replace("empty", b"")
    assert open_object(store, "empty").read() == b"" and open_object(store, "empty").read(9) == b""
    store.replace("name", DATA)
    file = open_object(store, "name", block=100_000)
    assert file.read(10) == DATA[:10]
    store.replace("name", DATA[:200_000])
    with pytest.raises(StorageError, match="became shorter"):
        file.read()


def test_open_stream__is_for_reading() -> None:
    with pytest.raises(StorageError, match="for reading"):
        open_stream("x.tar", "wb")
