"""Shards are what other tools take for a tar, hold the very bytes, and come out the same every time."""

import hashlib
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import webdataset
from PIL import Image
from webdataset.gopen import gopen_schemes

from datapipe.__main__ import main
from datapipe.core import cli
from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import INDEX, Manifest
from datapipe.dataset.tar import header
from datapipe.ingest.pipeline import ingest
from datapipe.ingest.shard_plan import Plan, plan_shards, sample_key
from datapipe.storage import open_stream
from tests.conftest import S3Server

WriteCrops = Callable[..., dict[str, bytes]]
CONFIG = ShardConfig(samples_per_shard=16, workers=1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard(
    source: Path,
    out: str,
    config: ShardConfig = CONFIG,
    storage: StorageConfig = StorageConfig(),  # noqa: B008
) -> Manifest:
    return ingest([str(source)], out, config, storage).manifest


def test_header__is_the_one_the_standard_library_writes() -> None:
    buffer = BytesIO()
    member = tarfile.TarInfo("ab" * 16 + ".jpg")
    member.size = 3
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member, BytesIO(b"abc"))
    assert header("ab" * 16, 3) == buffer.getvalue()[:512]


def test_shards__hold_every_crop_for_gnu_tar(tmp_path: Path, write_crops: WriteCrops) -> None:
    crops = write_crops(tmp_path / "crops", 50)
    manifest = shard(tmp_path / "crops", f"{tmp_path}/out")
    assert [shard.rows for shard in manifest.shards] == [16, 16, 16, 2]
    (tmp_path / "unpacked").mkdir()
    for entry in manifest.shards:
        done = subprocess.run(
            ["tar", "-xf", f"{tmp_path}/out/{entry.name}", "-C", f"{tmp_path}/unpacked"],
            check=True,
            capture_output=True,
        )
        assert done.stderr == b""
        listing = subprocess.run(
            ["tar", "--utc", "-tvf", f"{tmp_path}/out/{entry.name}"], check=True, capture_output=True, text=True
        ).stdout
        assert all(line.startswith("-rw-r--r-- 0/0 ") and "1970-01-01 00:00" in line for line in listing.splitlines())
    unpacked = contents(tmp_path / "unpacked")
    assert unpacked == {f"{sample_key('crops', name)}.jpg": data for name, data in crops.items()}


def test_shards__hold_every_crop_for_webdataset(
    tmp_path: Path, write_crops: WriteCrops, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locally and on S3, with our handler registered for its scheme."""
    crops = write_crops(tmp_path / "crops", 40)
    out = f"s3://{s3.bucket()}/set"
    local, remote = shard(tmp_path / "crops", f"{tmp_path}/out"), shard(tmp_path / "crops", out, storage=s3.storage)
    assert local.id == remote.id
    monkeypatch.setitem(gopen_schemes, "s3", partial(open_stream, config=s3.storage))
    for manifest in (local, remote):
        urls = [f"{manifest.url}/{entry.name}" for entry in manifest.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert {sample["__key__"]: sample["jpg"] for sample in samples} == {
            sample_key("crops", name): data for name, data in crops.items()
        }


def test_index__says_where_each_crop_is_and_what_it_was(tmp_path: Path, write_crops: WriteCrops) -> None:
    crops = write_crops(tmp_path / "crops", 40)
    manifest = shard(tmp_path / "crops", f"{tmp_path}/out")
    for entry in manifest.shards:
        tar = (tmp_path / "out" / entry.name).read_bytes()
        index = (tmp_path / "out" / entry.index).read_bytes()
        assert hashlib.sha256(tar).hexdigest() == entry.sha256 and len(tar) == entry.bytes
        assert hashlib.sha256(index).hexdigest() == entry.index_sha256
        table = pyarrow.parquet.read_table(BytesIO(index))
        assert table.schema.equals(INDEX)
        for row in table.to_pylist():
            data = tar[row["offset"] : row["offset"] + row["size"]]
            assert data == crops[row["name"]] and hashlib.sha256(data).digest() == row["sha256"]
            assert Image.open(BytesIO(data)).size == (row["width"], row["height"])
            assert (row["pid"], row["camera"]) == (int(row["name"][:4]), int(row["name"][6]))
            assert row["source"] == "crops"


@pytest.mark.slow
def test_shards__are_byte_identical_for_any_number_of_workers(
    tmp_path: Path, write_crops: WriteCrops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapipe.ingest.work_units.PART_BYTES", 1)
    write_crops(tmp_path / "a" / "crops", 60)
    write_crops(tmp_path / "b", 30, seed=1)
    sources = [f"{tmp_path}/a/crops", f"{tmp_path}/b"]
    ingest(sources, f"{tmp_path}/one", CONFIG, StorageConfig())
    ingest(
        sources[::-1],
        f"{tmp_path}/two",
        ShardConfig(samples_per_shard=16, workers=2, spool=f"{tmp_path}/spool"),
        StorageConfig(),
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not (tmp_path / "spool").exists()


def test_shards__survive_a_way_through_other_tars(tmp_path: Path, write_crops: WriteCrops) -> None:
    """Our own shards, and those of others, are sources again; no byte of a crop changes."""
    crops = write_crops(tmp_path / "crops", 20)
    with webdataset.TarWriter(f"{tmp_path}/others.tar") as writer:
        for name, data in crops.items():
            writer.write({"__key__": name.removesuffix(".jpg"), "jpg": data, "json": {"note": "kept out"}})
    first = ingest([f"{tmp_path}/others.tar"], f"{tmp_path}/first", CONFIG, StorageConfig()).manifest
    again = ingest([f"{tmp_path}/first/shards"], f"{tmp_path}/again", CONFIG, StorageConfig()).manifest
    for manifest in (first, again):
        stored = manifest.table(["sha256"])["sha256"].to_pylist()
        assert sorted(stored) == sorted(hashlib.sha256(data).digest() for data in crops.values())
    assert sorted(first.table(["name"])["name"].to_pylist()) == sorted(crops)


def test_shard__refuses_a_spool_that_changed(
    tmp_path: Path, write_crops: WriteCrops, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_crops(tmp_path / "crops", 20)
    spool = tmp_path / "spool"

    def planned(*arguments: Any) -> Plan:
        for file in spool.rglob("*.crops"):
            file.write_bytes(file.read_bytes()[:-100] + bytes(100))
        return plan_shards(*arguments)

    monkeypatch.setattr("datapipe.ingest.pipeline.plan_shards", planned)
    with pytest.raises(DataError, match="not what they were when they were read before"):
        shard(tmp_path / "crops", f"{tmp_path}/out", ShardConfig(samples_per_shard=16, workers=1, spool=str(spool)))


def test_shard__refuses_a_name_that_holds_other_bytes(tmp_path: Path, write_crops: WriteCrops) -> None:
    write_crops(tmp_path / "crops", 20)
    manifest = shard(tmp_path / "crops", f"{tmp_path}/out")
    (tmp_path / "out" / manifest.file).unlink()
    (tmp_path / "out" / manifest.shards[1].index).unlink()
    (tmp_path / "out" / manifest.shards[1].name).write_bytes(b"something else")
    with pytest.raises(DataError, match="taken by other bytes") as caught:
        shard(tmp_path / "crops", f"{tmp_path}/out")
    assert manifest.shards[1].name in caught.value.where


@pytest.mark.parametrize("change", [lambda data: data[:-30], lambda data: b"PAR1" + bytes(len(data))])
def test_shard__refuses_a_finished_index_that_is_damaged(
    tmp_path: Path, write_crops: WriteCrops, change: Callable[[bytes], bytes]
) -> None:
    write_crops(tmp_path / "crops", 20)
    manifest = shard(tmp_path / "crops", f"{tmp_path}/out")
    (tmp_path / "out" / manifest.file).unlink()
    index = tmp_path / "out" / manifest.shards[1].index
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(DataError, match="index of a shard that an earlier run finished is damaged") as caught:
        shard(tmp_path / "crops", f"{tmp_path}/out")
    assert caught.value.where == str(index)


@pytest.mark.parametrize("damaged", ["parquet", "refused.parquet"])
def test_shard__refuses_rows_of_a_spool_that_are_damaged(
    tmp_path: Path, write_crops: WriteCrops, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    write_crops(tmp_path / "crops", 20)
    (tmp_path / "crops" / "none.jpg").write_bytes(b"no image")
    spool = tmp_path / "spool"

    def planned(*arguments: Any) -> Plan:
        for file in spool.rglob(f"*.{damaged}"):
            file.write_bytes(file.read_bytes()[:-30])
        return plan_shards(*arguments)

    monkeypatch.setattr("datapipe.ingest.pipeline.plan_shards", planned)
    with pytest.raises(DataError, match="what an earlier run has left of its work is damaged"):
        shard(tmp_path / "crops", f"{tmp_path}/out", ShardConfig(samples_per_shard=16, workers=1, spool=str(spool)))


@pytest.mark.parametrize("command", ["stats", "reshard"])
def test_quarantine__that_is_damaged_is_one_clear_error(
    tmp_path: Path, write_crops: WriteCrops, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", 20)
    shard(tmp_path / "crops", f"{tmp_path}/out")
    listed = tmp_path / "out" / "quarantine.parquet"
    listed.write_bytes(listed.read_bytes()[:-30])
    words = [command, f"{tmp_path}/out", *(["--out", f"{tmp_path}/other"] if command == "reshard" else [])]
    assert cli.run(main, words) == 1
    assert f"where: {listed}" in capsys.readouterr().err
