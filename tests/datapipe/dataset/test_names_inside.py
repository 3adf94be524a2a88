"""Names that files of a data set or a checkpoint hold lead nowhere but into its own folder, or are refused."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from datapipe.commands.inspect import verify
from datapipe.core.config import RemoveConfig, ShardConfig, StorageConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.dataset.index import Shard, read_index
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import verify as check
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.remove import remove
from datapipe.maintain.repair import repair
from datapipe.storage import open_store, unsafe
from datapipe.storage.local import OpenFilesStore
from tests.conftest import S3Server
from training.checkpoint.metadata import MARKER, Form, Fragment, Marker, RankFile, read_marker

STORAGE = StorageConfig()
OUTSIDE = {
    "absolute": "{outside}/x{ending}",
    "parent": "../outside/x{ending}",
    "deeper": "shards/../../outside/x{ending}",
    "home": "~/x{ending}",
    "drive": "C:/x{ending}",
    "backslashes": "..\\outside\\x{ending}",
    "NUL": "shards/x\0{ending}",
    "newline": "shards/x\n{ending}",
    "empty part": "shards//x{ending}",
    "dot": "./shards/x{ending}",
    "empty": "",
    "another kind": "shards/x.json",
    "a number": 7,
}


@pytest.fixture
def folder(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """A data set of one shard, beside a folder `outside` with a file that is not its own."""
    write_crops(tmp_path / "crops", 4)
    ingest([f"{tmp_path}/crops"], f"{tmp_path}/set", ShardConfig(workers=1), STORAGE)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.parquet").write_bytes(b"somebody's")
    return tmp_path / "set"


def forge(folder: Path, **changes: Any) -> None:
    """A manifest with these entries of its shard, whose id is right."""
    manifest = Manifest.load(str(folder))
    shard = dataclasses.replace(manifest.shards[0], **changes)
    forged = dataclasses.replace(manifest, shards=(shard,))
    (folder / manifest.file).unlink()
    text = {**forged._content(), "id": forged.id, "rows": forged.rows, "bytes": forged.bytes}
    (folder / manifest.file).write_text(json.dumps(text))


def untouched(folder: Path) -> bool:
    outside = folder.parent / "outside"
    return [path.name for path in outside.iterdir()] == ["x.parquet"] and (
        (outside / "x.parquet").read_bytes() == b"somebody's"
    )


@pytest.mark.parametrize(("entry", "ending"), [("index", ".parquet"), ("name", ".tar")])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_manifest__that_names_a_file_elsewhere_is_refused(folder: Path, entry: str, ending: str, kind: str) -> None:
    name: Any = OUTSIDE[kind]
    name = name.format(outside=folder.parent / "outside", ending=ending) if isinstance(name, str) else name
    forge(folder, **{entry: name})
    for work in (
        lambda: verify([str(folder), "--repair", "--workers", "1"]),
        lambda: check(str(folder), "none", STORAGE, workers=1),
        lambda: remove(str(folder), RemoveConfig(source="crops"), STORAGE),
    ):
        with pytest.raises(DataError, match="names a file that cannot be its own") as caught:
            work()
        assert f"shards[0].{entry}" in caught.value.where and repr(name) in caught.value.where
    assert untouched(folder)


@pytest.mark.parametrize("change", [{"sha256": "../../x"}, {"index_sha256": "0"}, {"rows": -4}, {"bytes": 1.5}])
def test_manifest__with_other_entries_that_are_none_is_refused(folder: Path, change: dict[str, Any]) -> None:
    """Blocks of the cache on a node are called after the checksum of the shard."""
    forge(folder, **change)
    with pytest.raises(DataError, match="that is none"):
        Manifest.load(str(folder))
    assert untouched(folder)


def test_selection__elsewhere_is_refused(folder: Path) -> None:
    manifest = Manifest.load(str(folder))
    for file, sha256 in (("../outside/x.parquet", "0" * 64), ("selections/x.parquet", "../x")):
        text = json.loads((folder / manifest.file).read_text())
        text["selection"] = {"file": file, "sha256": sha256, "rows": 1}
        (folder / "manifest-v0002-00000000.json").write_text(json.dumps(text))
        with pytest.raises(DataError, match="cannot be its own|checksum that is none") as caught:
            Manifest.load(str(folder))
        assert "selection." in caught.value.where


def test_index_and_tar__with_keys_that_are_none_are_refused(folder: Path) -> None:
    """Members of tars are called after keys, and others unpack them."""
    store, manifest = open_store(str(folder)), Manifest.load(str(folder))
    (shard,) = manifest.shards
    table = read_index(store, shard)
    bad = table.set_column(0, "key", pyarrow.array(["../../../x", *table["key"].to_pylist()[1:]]))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(bad, sink)
    store.replace(shard.index, sink.getvalue())
    forge(folder, index_sha256=hashlib.sha256(sink.getvalue()).hexdigest())
    with pytest.raises(DataError, match="holds a key that is none: '../../../x'"):
        remove(str(folder), RemoveConfig(source="crops", workers=1), STORAGE)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("../../../x.jpg", "b.jpg", "c.jpg", "d.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    store.replace(shard.name, tar.getvalue())
    forge(folder, sha256=hashlib.sha256(tar.getvalue()).hexdigest(), bytes=len(tar.getvalue()))
    with pytest.raises(DataError, match="not called after its key"):
        repair(str(folder), STORAGE, workers=1)
    assert untouched(folder) and not list((folder / "removals").glob("begun-*"))


@pytest.mark.parametrize("link", ["shards", "index"])
def test_data_set__with_links_out_of_it_is_read_but_not_written(folder: Path, link: str) -> None:
    outside = folder.parent / "outside"
    (shard,) = Manifest.load(str(folder)).shards
    inside = folder / ("shards" if link == "shards" else shard.index)
    os.rename(inside, outside / "moved")
    inside.symlink_to(outside / "moved")
    assert check(str(folder), "none", STORAGE, workers=1).findings == []
    for work in (
        lambda: repair(str(folder), STORAGE, workers=1),
        lambda: remove(str(folder), RemoveConfig(source="crops"), STORAGE),
    ):
        with pytest.raises(DataError, match="a link leads out of the data set"):
            work()


def test_data_set__behind_a_link_is_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert list(repair(str(tmp_path / "link"), STORAGE, workers=1).lines()) == []


@pytest.mark.parametrize("deleted", ["../outside/x.parquet", "manifest-v0001.json", 5])
def test_record__that_deletes_elsewhere_is_refused(folder: Path, deleted: Any) -> None:
    (folder / "removals").mkdir()
    record = {"format": 1, "count": 0, "replaced": {}, "deleted": [deleted], "keys_sha256": []}
    (folder / "removals" / "x.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="record of a removal is damaged"):
        repair(str(folder), STORAGE, workers=1)
    assert untouched(folder)


@pytest.mark.parametrize("name", ["/etc/x", "../rank.safetensors", "a/b.safetensors", "..", "", MARKER, "a\\b", 3])
def test_marker__that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    def marker(step: int, name: Any) -> Marker:
        file = RankFile(name, 8, "0" * 64, (Fragment("model/x", 0, 2, 0, "0" * 32),))
        return Marker(step=step, samples=2, manifest="m", manifest_rows=2, seed=0, batch=2, world=1,
                      tensors={"model/x": Form((2,), "F32")}, files=(file,), steps={})  # fmt: skip

    store = open_store(str(tmp_path))
    store.create(f"step_0000002/{MARKER}", marker(2, "rank_00000.x.safetensors").to_bytes())
    assert read_marker(store, "step_0000002").files[0].name == "rank_00000.x.safetensors"
    store.create(f"step_0000001/{MARKER}", marker(1, name).to_bytes())
    with pytest.raises(DataError, match="names the file .* which cannot be one of its own") as caught:
        read_marker(store, "step_0000001")
    assert caught.value.where == f"{tmp_path}/step_0000001/{MARKER}"


def test_unsafe__takes_plain_names_alone() -> None:
    good = ["a", "a/b.tar", "shards/3f2a-000000.tar", "..a/b..", "ä/ü", "a b", "...", ".spool/x", "C/x"]
    assert [name for name in good if unsafe(name)] == []
    assert all(unsafe(name) for name in ("/a", "a/../b", "..", ".", "a/", "a//b", "c:x", "a\\b", "a\x7f", None, b"a"))


def test_store__writes_and_reads_nothing_outside(tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    bucket = s3.bucket()
    for url in (str(tmp_path / "in"), f"s3://{bucket}/in", "memory://bucket/in"):
        store = open_store(url, s3.storage)
        store.create("a", b"1")
        for name in ("../outside", "a/../../outside", f"{tmp_path}/outside", "/outside", "x\0"):
            for work in (lambda: store.replace(name, b"y"), lambda: store.delete(name),  # noqa: B023
                         lambda: store.put_if_absent(name, b"y")):  # fmt: skip  # noqa: B023
                with pytest.raises(StorageError, match="leads out of the folder"):
                    work()
    for local in (open_store(str(tmp_path / "in")), OpenFilesStore(str(tmp_path / "in"))):
        with pytest.raises(StorageError, match="leads out of the folder"):
            local.read("../outside", start=0, size=1)
    assert (tmp_path / "outside").read_bytes() == b"x" and set(s3.objects(bucket)) == {"in/a"}


def test_shard__is_what_forge_makes(folder: Path) -> None:
    """The manifests above are refused for their names alone."""
    forge(folder, index=Manifest.load(str(folder)).shards[0].index)
    assert isinstance(Manifest.load(str(folder)).shards[0], Shard)
