"""LMDBs as the lmdb package writes them are read to the last byte; cut and damaged ones end in one error, no signal."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.sources import open_sources
from datapipe.sources.lmdb_pages import LmdbFile
from tests.datapipe.crop_set import jpegs
from tests.datapipe.sources.read_source import crops

PAGE = 4096


def write(path: Path, content: dict[bytes, bytes], **how: object) -> Path:
    """The data file of an LMDB, in several transactions."""
    items = sorted(content.items(), key=lambda item: item[0][::-1])
    with lmdb.open(str(path), map_size=1 << 26, max_dbs=2, **how) as environment:  # type: ignore[arg-type]
        for start in range(0, len(items), 150):
            with environment.begin(write=True) as transaction:
                for key, value in items[start : start + 150]:
                    transaction.put(key, value)
    return path / "data.mdb" if path.is_dir() else path


def contents(path: Path) -> dict[bytes, bytes]:
    with LmdbFile(str(path), where=str(path)) as file:
        return {key: file.read(value) for key, value in file.items()}


@pytest.fixture(scope="module")
def content() -> dict[bytes, bytes]:
    """Values of all sizes: in a leaf, on one page of their own, on several; two levels of branches."""
    random_ = random.Random(0)
    sizes = (0, 1, 7, 300, 1500, 2100, 5000, 9000)
    return {b"%02d_%06d" % (n % 7, n): random_.randbytes(sizes[n % len(sizes)]) for n in range(600)}


def test_lmdb_file__holds_what_the_library_wrote(tmp_path: Path, content: dict[bytes, bytes]) -> None:
    path = write(tmp_path / "set", content)
    with lmdb.open(str(tmp_path / "set")) as environment, environment.begin(write=True) as transaction:
        gone = [key for number, key in enumerate(sorted(content)) if number % 3 == 0]
        assert all(transaction.delete(key) for key in gone)
    left = {key: value for key, value in content.items() if key not in set(gone)}
    assert contents(path) == left
    with LmdbFile(str(path), where="x") as file:
        assert file.entries == len(left) and list(left) != [key for key, _ in file.items()] == sorted(left)
        assert all(file.read(value) == left[key] for key in left if (value := file.find(key)))
        assert [file.find(key) for key in (gone[0], b"", b"zz", b"03")] == [None] * 4


def test_lmdb_file__single_files_empty_ones_and_named_databases(tmp_path: Path) -> None:
    write(tmp_path / "empty", {})
    assert contents(tmp_path / "empty" / "data.mdb") == {}
    alone = write(tmp_path / "alone.mdb", {b"a": b"1"}, subdir=False)
    os.remove(tmp_path / "alone.mdb-lock")
    alone.chmod(0o400)
    assert contents(alone) == {b"a": b"1"}
    path = write(tmp_path / "named", {b"a": b"1"})
    with lmdb.open(str(tmp_path / "named"), max_dbs=2) as environment:
        environment.open_db(b"other")
    with LmdbFile(str(path), where="x") as file:
        assert {key: value.problem for key, value in file.items()} == {b"a": "", b"other": "a named database"}


def test_lmdb_file__of_backward_and_of_numbered_keys(tmp_path: Path) -> None:
    """The main database of the Python library has neither: keys that are ordered alike in all ways."""
    keys = [bytes([number]) * 8 for number in range(256)]
    path = write(tmp_path / "set", {key: key * 9 for key in keys})
    good = path.read_bytes()
    for flags in (0x02, 0x08):
        changed = bytearray(good)
        for meta in (0, PAGE):
            changed[meta + 92] = flags
        path.write_bytes(changed)
        with LmdbFile(str(path), where="x") as file:
            assert [key for key, _ in file.items()] == keys
            assert all(value is not None and file.read(value) == key * 9 for key in keys for value in [file.find(key)])


def cut_files(data: bytes) -> Iterator[bytes]:
    for size in (0, 10, PAGE, PAGE + 50, 2 * PAGE, len(data) // 3, len(data) // 2, len(data) - PAGE, len(data) - 9):
        yield data[:size]


def test_lmdb__that_is_cut_is_one_error_whatever_is_missing(tmp_path: Path) -> None:
    images = {f"00_00_0000_{number:08d}".encode(): data for number, data in enumerate(jpegs(40))}
    path = write(tmp_path / "set", images)
    data = path.read_bytes()
    for cut in cut_files(data):
        path.write_bytes(cut)
        with pytest.raises(DataError, match="LMDB cannot be read") as caught:
            crops(str(tmp_path / "set"))
        assert caught.value.where == str(path) and "copy it again" in caught.value.hint
    path.write_bytes(data[: len(data) // 2])
    os.truncate(path, len(data))  # the rest are zeros
    with pytest.raises(DataError, match="cannot be read: page"):
        crops(str(tmp_path / "set"))


def test_lmdb__cut_while_it_is_read_is_one_error(tmp_path: Path) -> None:
    images = {f"00_00_0000_{number:08d}".encode(): data for number, data in enumerate(jpegs(40))}
    path = write(tmp_path / "set", images)
    (source,) = open_sources([str(tmp_path / "set")], StorageConfig())
    (unit,) = source.units()
    reading = source.read(unit)
    next(reading)
    os.truncate(path, 4 * PAGE)
    with pytest.raises(DataError, match="is cut"):
        list(reading)


def test_lmdb_file__whatever_is_damaged__is_an_error_or_other_content(
    tmp_path: Path, content: dict[bytes, bytes]
) -> None:
    path = write(tmp_path / "set", content)
    good, random_, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(random_.randrange(1, 60)):
            page = PAGE * random_.randrange(len(good) // PAGE)
            bad[page + random_.randrange(64)] = random_.randrange(256)
        path.write_bytes(bad)
        try:
            contents(path)
        except DataError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"<!DOCTYPE html><html>" + b" " * 9_000, "an HTML page"), (b"PK\x03\x04" + bytes(9_000), "a zip"),
     (b"SQLite format 3\0" + bytes(9_000), "an SQLite database")],
    ids=["html", "zip", "sqlite"],
)  # fmt: skip
def test_lmdb_file__of_another_kind_is_named(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(DataError, match=f"no LMDB: {told}") as raised, LmdbFile(str(tmp_path / "data.mdb"), where="x"):
        pass
    assert "cut" not in raised.value.hint


def test_lmdb_file__of_another_machine_or_version_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "set", {b"a": b"1"})
    good = path.read_bytes()
    for start, new, said in (
        (16, (0xBEEFC0DE).to_bytes(4, "big"), "other byte order"),
        (20, b"\2", "data version 2"),
        (40, b"\1\0\0\0", "would have 1 bytes"),
        (PAGE + 16, b"none", "second meta page"),
        (16, b"none", "no LMDB"),
    ):
        path.write_bytes(good[:start] + new + good[start + len(new) :])
        with pytest.raises(DataError, match=said):
            contents(path)
    with pytest.raises(DataError, match="cannot be read"):
        contents(tmp_path)
