"""A manifest has an id of its content, is written once, and is refused when it is not what was written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.manifest import FORMAT, Manifest, Shard
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.datapipe import crop_set

SHARD = Shard("shards/a.tar", 3, 4096, "0" * 64, "shards/a.parquet", "1" * 64)


def test_manifest__reads_back_from_anywhere(tmp_path: Path, s3: S3Server) -> None:
    manifest = Manifest((SHARD,), name="set", plan="p", licence="research only", quarantined=2, made_by={"numpy": "2"})
    for url in (str(tmp_path / "set"), f"s3://{s3.bucket()}/set"):
        saved = manifest.save(open_store(url, s3.storage))
        assert saved.url == url and saved == manifest
        assert Manifest.load(url, s3.storage) == Manifest.load(f"{url}/manifest-v0001.json", s3.storage) == manifest
    assert (manifest.rows, manifest.bytes) == (3, 4096)


def test_id__is_of_the_content_and_nothing_else() -> None:
    base = Manifest((SHARD,), name="set")
    assert base.id == dataclasses.replace(base, url="elsewhere", made_by={"numpy": "3"}).id
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"name": "x"},
            {"plan": "x"},
            {"parent": "x"},
            {"licence": "x"},
            {"quarantined": 1},
            {"notes": ("labelled data",)},
            {"version": 2},
            {"shards": (SHARD, SHARD)},
            {"shards": (dataclasses.replace(SHARD, sha256="2" * 64),)},
        )
    ]
    assert len({base.id, *(other.id for other in others)}) == 10


def test_notes__are_kept_and_absent_ones_leave_no_trace(tmp_path: Path) -> None:
    """Manifests from before there were notes keep their ids."""
    store = open_store(str(tmp_path))
    plain = Manifest((SHARD,)).save(store)
    assert "notes" not in json.loads((tmp_path / plain.file).read_text())
    noted = plain.derive(store, "select", notes=("labelled data",))
    assert Manifest.load(str(tmp_path)).notes == ("labelled data",) and Manifest.load(str(tmp_path)).id == noted.id
    assert noted.derive(store, "remove", removed=1).notes == ("labelled data",)


def test_save__is_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    Manifest((SHARD,), name="one").save(store)
    Manifest((SHARD,), name="one").save(store)
    with pytest.raises(DataError, match="another data set"):
        Manifest((SHARD,), name="two").save(store)
    assert Manifest.load(str(tmp_path)).name == "one"


def test_load__takes_the_newest(tmp_path: Path) -> None:
    for version in (1, 2, 10, 9):
        Manifest((SHARD,), version=version).save(open_store(str(tmp_path)))
    assert Manifest.load(str(tmp_path)).version == 10
    assert Manifest.load(str(tmp_path / "manifest-v0002.json")).version == 2


def test_load__says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        Manifest.load(str(tmp_path / "missing"))
    with pytest.raises(NotFoundError, match="no data set"):
        Manifest.load(str(tmp_path))
    with pytest.raises(NotFoundError, match="no such manifest"):
        Manifest.load(str(tmp_path / "manifest-v0003.json"))
    open_store(str(tmp_path)).create("shards/a.tar", b"1")
    with pytest.raises(DataError, match="not complete"):
        Manifest.load(str(tmp_path))
    path = tmp_path / Manifest((SHARD,)).save(open_store(str(tmp_path))).file
    good = path.read_text()
    for bad in (good[:-20], "[]", "{}", good.replace('"name": "shards/a.tar",', ""), "\x00"):
        path.write_text(bad)
        with pytest.raises(DataError, match="cannot be read"):
            Manifest.load(str(tmp_path))
    for bad in (good.replace('"rows": 3', '"rows": 4'), good.replace("0000", "0001", 1)):
        path.write_text(bad)
        with pytest.raises(DataError, match="does not match its own id"):
            Manifest.load(str(tmp_path))
    for other in (FORMAT - 1, FORMAT + 1):
        path.write_text(json.dumps({**json.loads(good), "format": other}))
        with pytest.raises(DataError, match=f"format {other}"):
            Manifest.load(str(tmp_path))


def test_table__has_one_row_per_sample_id_and_checks_the_hashes(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 25)
    table = crops.manifest.table(["pid", "size"])
    assert table.column_names == ["pid", "size"]
    assert np.array_equal(table["pid"].to_numpy(), np.arange(25) // 2)
    assert table["size"].to_pylist() == [len(data) for data in crops.jpegs]
    index = tmp_path / "set" / crops.manifest.shards[1].index
    data = index.read_bytes()
    index.write_bytes(data[:-1] + b"x")
    with pytest.raises(DataError, match="not the one that was written") as caught:
        crops.manifest.table(["pid"])
    assert str(index) == caught.value.where
    index.unlink()
    with pytest.raises(DataError, match="missing"):
        crops.manifest.table(["pid"])
