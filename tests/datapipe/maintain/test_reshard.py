"""Data sets merged and cut anew: the same bytes, the plan of `shard`, nothing decoded."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from datapipe.core.config import RemoveConfig, ReshardConfig, SelectConfig, ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import verify
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.remove import remove
from datapipe.maintain.reshard import reshard
from datapipe.maintain.select import select
from tests.conftest import S3Server
from tests.datapipe.core.test_cli import contents

STORAGE = StorageConfig()
WriteCrops = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_crops: WriteCrops) -> Path:
    """Sources a (30 crops), b (11, ten of them pictures of a, and one that is none) and the data sets a_set, b_set."""
    folder = tmp_path_factory.mktemp("reshard")
    write_crops(folder / "a", 30)
    write_crops(folder / "b", 10)
    (folder / "b" / "broken.jpg").write_bytes(b"no image")
    for name, each in (("a", 8), ("b", 5)):
        config = ShardConfig(samples_per_shard=each, workers=1, max_bad=1.0)
        ingest([f"{folder}/{name}"], f"{folder}/{name}_set", config, STORAGE, licence=f"licence of {name}")
    return folder


def rows(url: str, storage: StorageConfig = STORAGE) -> list[dict[str, Any]]:
    return Manifest.load(url, storage).table(INDEX.names, storage).to_pylist()


def test_reshard__gives_what_shard_gives_for_the_same_settings(folder: Path, tmp_path: Path) -> None:
    """Names, bytes and marks, whatever way the crops took."""
    sources = [f"{folder}/a", f"{folder}/b"]
    ingest(sources, f"{tmp_path}/direct", ShardConfig(samples_per_shard=9, workers=1, max_bad=1.0), STORAGE)
    done = reshard(
        [f"{folder}/a_set", f"{folder}/b_set"],
        f"{tmp_path}/merged",
        ReshardConfig(samples_per_shard=9, workers=1),
        STORAGE,
    )
    direct, merged = (contents(tmp_path / name / "shards") for name in ("direct", "merged"))
    assert direct == merged and len(merged) == 10
    assert sum(row["duplicate_of"] is not None for row in rows(f"{tmp_path}/merged")) == 10
    assert (done.manifest.rows, done.repeated, done.manifest.quarantined) == (40, 0, 1)
    assert done.manifest.licence == "licence of a; licence of b" and done.manifest.name == "a+b"
    refused = pyarrow.parquet.read_table(tmp_path / "merged" / "quarantine.parquet")
    assert refused["name"].to_pylist() == ["broken.jpg"]
    assert not (tmp_path / "merged" / ".spool").exists()
    assert verify(f"{tmp_path}/merged", "all", STORAGE, workers=1).findings == []


@pytest.mark.slow
def test_reshard__other_sizes_there_and_back(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    small = reshard(
        [f"{folder}/a_set"],
        f"s3://{bucket}/small",
        ReshardConfig(samples_per_shard=3, workers=1, spool=f"{tmp_path}/spool"),
        s3.storage,
    ).manifest
    assert len(small.shards) == 10
    back = reshard([small.url], f"{tmp_path}/back", ReshardConfig(samples_per_shard=8, workers=1), s3.storage).manifest
    assert contents(tmp_path / "back" / "shards") == contents(folder / "a_set" / "shards")
    assert back.plan == Manifest.load(f"{folder}/a_set").plan


def test_reshard__takes_what_is_selected_and_not_what_was_removed(folder: Path, tmp_path: Path) -> None:
    url = str(shutil.copytree(folder / "a_set", tmp_path / "set"))
    chosen = select(url, SelectConfig(where="camera == 1"), STORAGE).manifest
    gone = rows(url)[0]["key"]
    (tmp_path / "keys.txt").write_text(gone)
    remove(url, RemoveConfig(keys=f"{tmp_path}/keys.txt", workers=1), STORAGE)
    done = reshard([url], f"{tmp_path}/out", ReshardConfig(workers=1), STORAGE)
    assert done.manifest.rows == chosen.rows - 1 == 14 and done.manifest.selection is None
    found = rows(f"{tmp_path}/out")
    assert {row["camera"] for row in found} == {1} and not any(row["removed"] for row in found)
    assert gone not in {row["key"] for row in found}
    assert verify(f"{tmp_path}/out", "all", STORAGE, workers=1).findings == []


def test_reshard__a_crop_of_two_sets_is_taken_once(folder: Path, tmp_path: Path) -> None:
    url = str(shutil.copytree(folder / "a_set", tmp_path / "set"))
    part = select(url, SelectConfig(fraction=0.5), STORAGE).manifest
    done = reshard(
        [f"{folder}/a_set", f"{url}/{part.file}", f"{folder}/b_set"],
        f"{tmp_path}/out",
        ReshardConfig(workers=1),
        STORAGE,
    )
    assert (done.repeated, done.manifest.rows) == (15, 40)


def test_reshard__refuses_one_key_with_two_pictures(folder: Path, tmp_path: Path, write_crops: WriteCrops) -> None:
    write_crops(tmp_path / "a", 30, seed=7)
    ingest([f"{tmp_path}/a"], f"{tmp_path}/set", ShardConfig(workers=1), STORAGE)
    with pytest.raises(DataError, match="30 crops have the same source and name, and different bytes"):
        reshard([f"{folder}/a_set", f"{tmp_path}/set"], f"{tmp_path}/out", ReshardConfig(workers=1), STORAGE)
    assert not list((tmp_path / "out").glob("**/*.tar"))


def test_reshard__excludes_duplicates_across_sets_and_lists_them(folder: Path, tmp_path: Path) -> None:
    done = reshard(
        [f"{folder}/a_set", f"{folder}/b_set"], f"{tmp_path}/out", ReshardConfig(exclude="exact", workers=1), STORAGE
    )
    assert (done.manifest.rows, done.manifest.quarantined) == (30, 11)
    refused = pyarrow.parquet.read_table(tmp_path / "out" / "quarantine.parquet")
    assert refused["reason"].to_pylist().count("exact duplicate") == 10


def test_reshard__notices_bytes_that_changed(folder: Path, tmp_path: Path) -> None:
    url = str(shutil.copytree(folder / "a_set", tmp_path / "set"))
    shard, row = Manifest.load(url).shards[1], rows(url)[8]
    tar = Path(url) / shard.name
    data = bytearray(tar.read_bytes())
    data[row["offset"] + 30] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match="not what they were") as caught:
        reshard([url], f"{tmp_path}/out", ReshardConfig(workers=1), STORAGE)
    assert caught.value.where == str(tar) and not list((tmp_path / "out").glob("manifest-*"))


def test_reshard__again_is_complete_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    out, config = f"{tmp_path}/out", ReshardConfig(samples_per_shard=10, workers=1)
    first = reshard([f"{folder}/a_set"], out, config, STORAGE)
    before = contents(tmp_path / "out")
    again = reshard([f"{folder}/a_set"], out, config, STORAGE)
    assert again.found_complete and again.manifest == first.manifest and contents(tmp_path / "out") == before
    with pytest.raises(DataError, match="samples_per_shard is 10 there and 11 here"):
        reshard([f"{folder}/a_set"], out, ReshardConfig(samples_per_shard=11, workers=1), STORAGE)
    with pytest.raises(DataError, match="other sources"):
        reshard([f"{folder}/b_set"], out, config, STORAGE)
    with pytest.raises(DataError, match="inside a source"):
        reshard([f"{folder}/a_set"], f"{folder}/a_set/new", config, STORAGE)


@pytest.mark.slow
def test_reshard__keeps_the_bytes_of_every_crop(folder: Path, tmp_path: Path) -> None:
    manifest = reshard(
        [f"{folder}/a_set"],
        f"{tmp_path}/out",
        ReshardConfig(seed=3, sidecars="json", workers=2, samples_per_shard=4),
        STORAGE,
    ).manifest
    for shard in manifest.shards:
        tar = (tmp_path / "out" / shard.name).read_bytes()
        for row in pyarrow.parquet.read_table(tmp_path / "out" / shard.index).to_pylist():
            data = tar[row["offset"] : row["offset"] + row["size"]]
            assert data == (folder / "a" / row["name"]).read_bytes()
            assert hashlib.sha256(data).digest() == row["sha256"]
    names = [row["name"] for row in rows(f"{tmp_path}/out")]
    assert sorted(names) == sorted(path.name for path in (folder / "a").iterdir())
    assert names != [row["name"] for row in rows(f"{folder}/a_set")] and len(np.unique(names)) == 30
