"""Zips and tars that Python, GNU tar, split and Info-ZIP wrote are read completely, never unpacked, or refused."""

import io
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.sources import archive, open_sources
from datapipe.sources.archive_parts import plain_name
from datapipe.sources.base import Crop
from tests.conftest import S3Server
from tests.datapipe.sources.read_source import crops, units

WriteCrops = Callable[..., dict[str, bytes]]
FILES = {"0002_c1s1_000451_03.jpg": b"one", "b/0007_c3.JPEG": b"two" * 500, "b/deep/x.png": b"three", "ä ö.webp": b""}
PASSED_OVER = {"readme.txt": b"no", ".hidden.jpg": b"no", "__MACOSX/._0002.jpg": b"no", "b/.git/x.jpg": b"no"}


def write_zip(path: Path, files: dict[str, bytes], methods: tuple[int, ...] = (zipfile.ZIP_DEFLATED,)) -> None:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.mkdir("b")
        for number, (name, data) in enumerate(files.items()):
            zipped.writestr(name, data, methods[number % len(methods)])


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w", tar_format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, mode, format=tar_format) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def contents(found: list[Crop]) -> dict[str, bytes]:
    assert len({crop.name for crop in found}) == len(found) and not any(crop.problem for crop in found)
    return {crop.name: crop.data for crop in found}


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def test_zip__gives_images_names_and_labels(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", FILES | PASSED_OVER, METHODS)
    found = crops(f"{tmp_path}/x.zip")
    assert contents(found) == FILES
    assert {(crop.source, crop.pid, crop.camera) for crop in found} == {
        ("x.zip", 2, 1),
        ("x.zip", 7, 3),
        ("x.zip", -1, -1),
    }


def test_zip__is_cut_into_units_and_is_the_same_on_an_object_store(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number:04d}_c1_{number}.jpg": bytes([number]) * 100 for number in range(50)}
    write_zip(tmp_path / "x.zip", files, METHODS)
    whole = [unit for _, unit in units(f"{tmp_path}/x.zip")]
    monkeypatch.setattr(archive, "UNIT_CROPS", 20)
    bucket = s3.bucket()
    s3.client.upload_file(str(tmp_path / "x.zip"), bucket, "set/x.zip")
    local, remote = units(f"{tmp_path}/x.zip"), units(f"s3://{bucket}/set/x.zip", s3.storage)
    assert [unit.digest for _, unit in local] == [unit.digest for _, unit in remote]
    assert [len(list(source.read(unit))) for source, unit in remote] == [20, 20, 10]
    assert sum(unit.bytes for _, unit in local) == whole[0].bytes and len(whole) == 1
    assert contents(crops(f"s3://{bucket}/set/x.zip", s3.storage)) == files
    assert [crop.name for crop in crops(f"s3://{bucket}/set", s3.storage)][0] == "x.zip/0000_c1_0.jpg"


def test_zip__of_more_than_32_bits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zipfile writes beyond 4 GiB and 65,535 members, with its limits lowered."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 200)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    write_zip(tmp_path / "x.zip", FILES)
    data = (tmp_path / "x.zip").read_bytes()
    assert b"PK\6\6" in data and b"PK\6\7" in data
    assert contents(crops(f"{tmp_path}/x.zip")) == FILES
    (tmp_path / "x.zip").write_bytes(b"#!/bin/sh\n" * 9 + data)  # a self-extracting one
    assert contents(crops(f"{tmp_path}/x.zip")) == FILES


def test_zip__names_in_old_code_pages_stay_apart(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {"a0.jpg": b"1", "a1.jpg": b"2", "a2.jpg": b"3"})
    data = (tmp_path / "x.zip").read_bytes()
    for old, new in ((b"a0.jpg", b"\x84\x94.jpg"), (b"a1.jpg", b"\x94\x84.jpg"), (b"a2.jpg", "é".encode() + b".jpg")):
        data = data.replace(old, new)
    (tmp_path / "x.zip").write_bytes(data)
    assert contents(crops(f"{tmp_path}/x.zip")) == {"äö.jpg": b"1", "öä.jpg": b"2", "é.jpg": b"3"}


def test_zip__refuses_encrypted_members(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", FILES)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match="encrypted") as caught:
        crops(f"{tmp_path}/x.zip")
    assert "ä ö.webp" in caught.value.where


def test_zip__reports_members_that_are_damaged(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", {"a.jpg": bytes(range(100)), "b.jpg": b"b" * 100}, (zipfile.ZIP_STORED,))
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(bytes(range(50, 60)), bytes(10)))
    damaged, sound = crops(f"{tmp_path}/x.zip")
    assert "damaged" in damaged.problem and damaged.data == b"" and damaged.name == "a.jpg"
    assert sound.data == b"b" * 100 and not sound.problem


@pytest.mark.parametrize("kept", [0, 10, 100, -1, -30])
def test_zip__refuses_a_cut_one(tmp_path: Path, kept: int) -> None:
    write_zip(tmp_path / "x.zip", FILES)
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data[:kept])
    with pytest.raises(DataError, match="cut") as caught:
        crops(f"{tmp_path}/x.zip")
    assert f"{tmp_path}/x.zip" in caught.value.where


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.TGZ", "w:gz")])
def test_tar__gives_images_names_and_labels(tmp_path: Path, name: str, mode: str, tar_format: int) -> None:
    write_tar(tmp_path / name, FILES | PASSED_OVER, mode, tar_format)
    found = crops(f"{tmp_path}/{name}")
    assert contents(found) == FILES and found[0][3:5] == (2, 1)


def test_tar__names_that_differ_after_a_dot_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: name.encode() for name in ("a.jpg", "a.png", "a.1.jpg", "a.2.jpg", "b/a.jpg", "a.jpg.jpg", "x..jpg")}
    write_tar(tmp_path / "plain.tar", files)
    assert contents(crops(f"{tmp_path}/plain.tar")) == files
    write_tar(tmp_path / "samples.tar", {"0.jpg": b"0", "0.json": b'{"pid": 4}', **files})
    assert contents(crops(f"{tmp_path}/samples.tar")) == {"0.jpg": b"0", **files}


def test_tar__refuses_what_follows_its_end(tmp_path: Path) -> None:
    """One tar appended to another: tarfile and GNU tar stop at the first one's end without a word."""
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        write_tar(tmp_path / name, FILES, mode)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * 2)
        with pytest.raises(DataError, match="read to its end"):
            crops(f"{tmp_path}/{name}")


def test_members__that_are_links_or_devices_are_reported_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    special = {
        "to_file.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "pipe": tarfile.FIFOTYPE,
        "disk.jpg": tarfile.BLKTYPE,
        "tty": tarfile.CHRTYPE,
        ".hidden": tarfile.SYMTYPE,
    }
    for name, files in (("plain.tar", FILES), ("samples.tar", {"0.jpg": b"0", "0.cls": b"1"})):
        write_tar(tmp_path / name, files)
        with tarfile.open(tmp_path / name, "a") as tar:
            for link, kind in special.items():
                member = tarfile.TarInfo(link)
                member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
                tar.addfile(member)
        reported = {crop.name: crop for crop in crops(f"{tmp_path}/{name}") if crop.problem}
        assert set(reported) == set(special) - {".hidden"}
        assert all(crop.data == b"" for crop in reported.values())
        assert f"symbolic link to {tmp_path}/secret.jpg" in reported["to_file.jpg"].problem
        assert "hard link" in reported["hard.jpg"].problem and "device" in reported["tty"].problem
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        link = zipfile.ZipInfo("folder")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        zipped.writestr(link, str(tmp_path))
        zipped.writestr("a.jpg", b"a")
    assert [(crop.name, crop.data, bool(crop.problem)) for crop in crops(f"{tmp_path}/x.zip")] == [
        ("folder", b"", True),
        ("a.jpg", b"a", False),
    ]


PART = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=60).filter(
    lambda part: not part.startswith(".")
)
NAME = st.builds(
    lambda start, parts, ending: start + "/".join(parts) + ending,
    st.sampled_from(["", "./", "../", "../../", "/", "//", "a/../../"]),
    st.lists(PART | st.sampled_from(["..", ".", "ein Name " * 15, "人" * 80]), min_size=1, max_size=4),
    st.sampled_from([".jpg", " .PNG", "/x.jpeg"]),
).filter(lambda name: not name.endswith("/..jpg"))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        NAME.filter(lambda name: not name.rpartition("/")[2].startswith(".")),
        min_size=1,
        max_size=6,
        unique_by=plain_name,
    )
)
def test_members__may_have_any_name_and_are_never_written(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: name.encode() for name in names}
    write_zip(folder / "x.zip", files)
    write_tar(folder / "pax.tar", files)
    write_tar(folder / "gnu.tar.gz", files, "w:gz", tarfile.GNU_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    for name in ("x.zip", "pax.tar", "gnu.tar.gz"):
        assert contents(crops(f"{folder}/{name}")) == {plain_name(name): data for name, data in files.items()}
    assert sorted(tmp_path.rglob("*")) == before and not any(os.path.lexists(name) for name in names)


# ---------------------------------------------------------------------------------------------- several files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.zip", ["-d", "-a3", "--numeric-suffixes=1"]),
        ("x.tar", ["-a2"]),
        ("x.tar.gz", ["-d", "-a3"]),
        ("x.tgz", ["-a3", "--additional-suffix="]),
    ],
    ids=["zip.001", "tar.aa", "tar.gz.000", "tgz.aaa"],
)
def test_pieces__are_read_as_one_file(tmp_path: Path, s3: S3Server, name: str, options: list[str]) -> None:
    files = {f"{number}.jpg": os.urandom(150) for number in range(40)}
    write = (
        write_zip
        if name.endswith("zip")
        else lambda path, files: write_tar(path, files, "w" if name.endswith(".tar") else "w:gz")
    )
    write(tmp_path / name, files)
    folder = tmp_path / "pieces"
    folder.mkdir()
    subprocess.run(["split", "-n", "4", *options, str(tmp_path / name), f"{folder}/{name}."], check=True)
    bucket = s3.bucket()
    for piece in folder.iterdir():
        s3.client.upload_file(str(piece), bucket, f"set/{piece.name}")
    first = min(folder.iterdir())
    assert contents(crops(f"{folder}/{name}")) == files == contents(crops(str(first)))
    assert contents(crops(f"s3://{bucket}/set/{name}", s3.storage)) == files
    assert contents(crops(f"s3://{bucket}/set/{first.name}", s3.storage)) == files
    assert contents(crops(str(folder))) == {f"{name}/{member}": data for member, data in files.items()}
    last = max(folder.iterdir())
    last.rename(tmp_path / "last")
    with pytest.raises(DataError, match="cut|end"):
        crops(str(folder))
    (tmp_path / "last").rename(last)
    sorted(folder.iterdir())[2].unlink()
    with pytest.raises(DataError, match="missing"):
        crops(str(folder))


def test_pieces__marked_as_parts_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", FILES)
    data = (tmp_path / "x.tar").read_bytes()
    for number in range(11):
        size = -(-len(data) // 11)
        (tmp_path / f"x.tar.part{number + 1}").write_bytes(data[number * size :][:size])
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar.md5").write_bytes(b"no piece")
    assert contents(crops(f"{tmp_path}/x.tar")) == FILES


def write_volumes(folder: Path, files: dict[str, bytes], each: int, name: str = "x") -> None:
    """A spanned zip as APPNOTE 6.3.9 (4.4, 8.5) describes it: a mark, members cut anywhere between their headers,
    places that count from the beginning of a volume."""
    volumes, directory = [bytearray(b"PK\x07\x08")], b""
    for file, data in files.items():
        header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data),
                             len(file), 0) + file.encode()  # fmt: skip
        if len(volumes[-1]) + len(header) > each:
            volumes.append(bytearray())
        place = (len(volumes) - 1, len(volumes[-1]))
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data),
                                 len(file), 0, 0, place[0], 0, 0, place[1]) + file.encode()  # fmt: skip
        volumes[-1] += header
        while data:
            if len(volumes[-1]) == each:
                volumes.append(bytearray())
            room = each - len(volumes[-1])
            volumes[-1] += data[:room]
            data = data[room:]
    last = len(volumes) - 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", last, last, len(files), len(files), len(directory), len(volumes[-1]), 0)
    volumes[-1] += directory + end
    for number, volume in enumerate(volumes, start=1):
        (folder / (f"{name}.zip" if number == len(volumes) else f"{name}.z{number:02d}")).write_bytes(volume)


SPANNED = {f"{number}.jpg": bytes([number]) * 700 * number for number in range(1, 9)}


@pytest.mark.parametrize("named", ["x.zip", "x.z01", ""])
def test_spanned_zip__is_read_where_its_volumes_lie(tmp_path: Path, named: str) -> None:
    write_volumes(tmp_path, SPANNED, 1_000)
    write_zip(tmp_path / "x.yz.zip", FILES)  # somebody else's
    assert len(list(tmp_path.glob("x.z*"))) > 20
    found = contents(crops(f"{tmp_path}/{named}" if named else str(tmp_path)))
    prefix = "" if named else "x.zip/"
    assert {name: data for name, data in found.items() if name.startswith(prefix)}.items() >= {
        f"{prefix}{name}": data for name, data in SPANNED.items()}.items()  # fmt: skip
    assert len(found) == len(SPANNED) + (0 if named else len(FILES))


@pytest.mark.parametrize("gone", ["x.z01", "x.z05", "x.zip"])
def test_spanned_zip__without_a_volume_is_refused(tmp_path: Path, gone: str) -> None:
    write_volumes(tmp_path, SPANNED, 5_000)
    assert {path.name for path in tmp_path.glob("x.z*")} == {*(f"x.z0{number}" for number in range(1, 6)), "x.zip"}
    (tmp_path / gone).unlink()
    for url in (tmp_path, tmp_path / "x.zip"):
        with pytest.raises(DataError, match="missing"):
            crops(str(url))


@pytest.mark.skipif(not shutil.which("zip"), reason="Info-ZIP is not installed")
def test_spanned_zip__of_info_zip_is_read(tmp_path: Path) -> None:
    files = {f"{number}.jpg": os.urandom(20_000) for number in range(8)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "set").mkdir()
    subprocess.run(["zip", "-q", "-s", "64k", "set/x.zip", *files], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"x.z01", "x.z02", "x.zip"}
    for url in ("set/x.zip", "set"):
        found = contents(crops(f"{tmp_path}/{url}"))
        assert {name.removeprefix("x.zip/"): data for name, data in found.items()} == files


def test_archives__of_one_source_are_mixed_freely(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "more").mkdir(parents=True)
    write_zip(folder / "a.zip", FILES)
    write_tar(folder / "more" / "b.tar", FILES)
    found = contents(crops(str(folder)))
    assert found == {f"{name}/{file}": data for name in ("a.zip", "more/b.tar") for file, data in FILES.items()}
    write_tar(folder / "more" / "c.tar", {"only.jpg": b"c"})
    pattern = crops(f"{folder}/more/{{b,c}}.tar")
    assert [crop.name for crop in pattern][-1] == "c.tar/only.jpg" and len(pattern) == len(FILES) + 1


def test_archive__gnu_tar_wrote_is_read(tmp_path: Path, write_crops: WriteCrops) -> None:
    files = write_crops(tmp_path / "crops", 12)
    (tmp_path / "crops" / "link.jpg").symlink_to("/etc/passwd")
    subprocess.run(["tar", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path / "crops"), "."], check=True)
    found = crops(f"{tmp_path}/x.tar")
    assert {crop.name: crop.data for crop in found if not crop.problem} == files
    assert [crop.name for crop in found if crop.problem] == ["link.jpg"]


def test_members__of_no_sane_size_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datapipe.sources.tar_members.MOST_MEMBER_BYTES", 1_000)
    monkeypatch.setattr("datapipe.sources.zip_members.MOST_MEMBER_BYTES", 1_000)
    write_zip(tmp_path / "x.zip", FILES)
    write_tar(tmp_path / "x.tar", FILES)
    for name in ("x.zip", "x.tar"):
        (large,) = (crop for crop in crops(f"{tmp_path}/{name}") if crop.problem)
        assert large.name == "b/0007_c3.JPEG" and "larger than 1,000 bytes" in large.problem


def test_open_sources__lists_what_is_understood(tmp_path: Path) -> None:
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match="no source of crops") as caught:
        open_sources([f"{tmp_path}/x.rar"], StorageConfig())
    assert all(word in caught.value.hint for word in ("a zip", "a tar", "LMDB", "parquet", "video", "folder of images"))
