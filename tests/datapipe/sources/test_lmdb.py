"""LMDBs that the lmdb package wrote, laid out as LUPerson's converter does, are read by their keys; no pickle runs."""

import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.sources import open_sources
from tests.conftest import S3Server
from tests.datapipe.crop_set import jpegs
from tests.datapipe.sources.read_source import crops, units


def convert(folder: Path, videos: dict[str, int]) -> dict[str, bytes]:
    """LMDB `lup_lmdb` and keys.pkl beside it: keys CC_cc_VVVV_NNNNNNNN, values the bytes of the files as an array."""
    images = jpegs(sum(videos.values()))
    crops: dict[str, bytes] = {}
    environment = lmdb.open(str(folder / "lup_lmdb"), map_size=1 << 24)
    for video, count in videos.items():
        with environment.begin(write=True) as transaction:  # one a city
            for number in range(count):
                key = f"{video}_{number:08d}"
                crops[key] = next(images)
                transaction.put(key.encode("ascii"), np.frombuffer(crops[key], np.uint8))
    environment.close()
    write_keys(folder, list(crops))
    return crops


def write_keys(folder: Path, keys: object) -> None:
    with open(folder / "keys.pkl", "wb") as file:
        pickle.dump(keys, file)


VIDEOS = {"00_00_0000": 3, "00_01_0007": 4, "12_03_0123": 5}


@pytest.mark.parametrize("given", ["", "lup_lmdb", "lup_lmdb/data.mdb"])
def test_lmdb__gives_keys_bytes_and_videos(tmp_path: Path, given: str) -> None:
    written = convert(tmp_path, VIDEOS)
    found = crops(f"{tmp_path}/{given}".rstrip("/"))
    assert [(crop.name, crop.data) for crop in found] == list(written.items())
    assert {crop.video for crop in found} == set(VIDEOS)
    assert {(crop.pid, crop.camera, crop.track, crop.frame) for crop in found} == {(-1, -1, -1, -1)}


def test_lmdb__follows_keys_pkl_as_a_list_as_a_dict_and_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = convert(tmp_path, VIDEOS)
    backwards = list(written)[::-1]
    url = f"{tmp_path}/lup_lmdb"
    monkeypatch.setattr("datapipe.sources.lmdb.UNIT_CROPS", 5)
    write_keys(tmp_path, backwards)
    assert [crop.name for crop in crops(url)] == backwards
    write_keys(tmp_path, {"keys": [key.encode() for key in backwards], "pids": list(range(len(backwards)))})
    assert [(crop.name, crop.pid) for crop in crops(url)] == [(key, pid) for pid, key in enumerate(backwards)]
    write_keys(tmp_path, {"keys": backwards})
    assert {crop.pid for crop in crops(url)} == {-1}
    (tmp_path / "keys.pkl").unlink()
    found = crops(url)
    assert [(crop.name, crop.data) for crop in found] == list(written.items())
    assert [len(unit.keys) for _, unit in units(url)] == [5, 5, 2]


def test_lmdb__units_change_with_keys_sizes_and_pids(tmp_path: Path) -> None:
    written = convert(tmp_path, VIDEOS)
    url = f"{tmp_path}/lup_lmdb"
    digests = [units(url)[0][1].digest]
    assert units(url)[0][1].bytes == sum(map(len, written.values()))
    write_keys(tmp_path, list(written)[1:])
    digests.append(units(url)[0][1].digest)
    write_keys(tmp_path, {"keys": list(written)[1:], "pids": [7] * (len(written) - 1)})
    digests.append(units(url)[0][1].digest)
    environment = lmdb.open(url, map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        transaction.put(list(written)[-1].encode(), b"other")
    environment.close()
    digests.append(units(url)[0][1].digest)
    assert len(set(digests)) == 4


def test_lmdb__tells_which_keys_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = convert(tmp_path, VIDEOS)
    write_keys(tmp_path, ["missing", *list(written)[2:]])
    first, *others = crops(f"{tmp_path}/lup_lmdb")
    assert first.name == "missing" and first.data == b"" and "not in the LMDB" in first.problem
    assert [crop.name for crop in others] == list(written)[2:] and "2 of 12 images are not in" in caplog.text
    write_keys(tmp_path, ["of", "another", "set"])
    with pytest.raises(DataError, match="none of the keys"):
        crops(f"{tmp_path}/lup_lmdb")


class Command:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.touched),)


def test_keys__that_ask_for_code_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    convert(tmp_path, VIDEOS)
    for keys in ([Command(tmp_path / "ran")], np.array(["a"]), {"keys": ["a"], "pids": np.array([1])}):
        write_keys(tmp_path, keys)
        with pytest.raises(DataError, match="asks for code") as caught:
            crops(f"{tmp_path}/lup_lmdb")
        assert caught.value.where == f"{tmp_path}/keys.pkl"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (b"no pickle", "no pickle"),
        (pickle.dumps(["a"])[:-3], "damaged"),
        (pickle.dumps({"names": ["a"]}), "no list"),
        (pickle.dumps({"keys": ["a"], "pids": [1, 2]}), "as many"),
        (pickle.dumps({"keys": ["a"], "pids": [1 << 31]}), "32 bits"),
        (pickle.dumps([1, 2]), "no list"),
    ],
    ids=["text", "cut", "no keys", "too many pids", "too large pids", "numbers"],
)
def test_keys__that_are_none_are_refused(tmp_path: Path, keys: bytes, message: str) -> None:
    convert(tmp_path, VIDEOS)
    (tmp_path / "keys.pkl").write_bytes(keys)
    with pytest.raises(DataError, match=message):
        crops(f"{tmp_path}/lup_lmdb")


def test_lmdb__on_an_object_store_is_fetched_once(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = convert(tmp_path, VIDEOS)
    bucket, temporary = s3.bucket(), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    s3.client.upload_file(f"{tmp_path}/lup_lmdb/data.mdb", bucket, "lup/lup_lmdb/data.mdb")
    s3.client.upload_file(f"{tmp_path}/keys.pkl", bucket, "lup/keys.pkl")
    monkeypatch.setattr("datapipe.sources.lmdb.UNIT_CROPS", 5)
    found = crops(f"s3://{bucket}/lup", s3.storage)
    assert [(crop.name, crop.data) for crop in found] == list(written.items())
    (copy,) = temporary.glob("*.mdb")
    before = copy.stat().st_mtime_ns
    inside = crops(f"s3://{bucket}/lup/lup_lmdb", s3.storage)
    assert crops(f"s3://{bucket}/lup", s3.storage) == found == [crop._replace(source="lup") for crop in inside]
    assert copy.stat().st_mtime_ns == before and not list(temporary.glob("*.part"))


def test_lmdb__that_is_none_or_several_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(b"no LMDB" * 1_000)
    with pytest.raises(DataError, match="2 LMDBs"):
        open_sources([str(tmp_path)], StorageConfig())
    with pytest.raises(DataError, match="no LMDB: a text") as caught:
        crops(f"{tmp_path}/a")
    assert caught.value.where == f"{tmp_path}/a/data.mdb"
