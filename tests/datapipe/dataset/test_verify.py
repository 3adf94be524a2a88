"""Whatever happens to a data set, `verify` names it."""

import dataclasses
import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import Decode, verify
from datapipe.ingest.pipeline import ingest
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.datapipe import crop_set


@pytest.fixture
def folder(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """A data set of three shards."""
    write_crops(tmp_path / "crops", 40)
    ingest([f"{tmp_path}/crops"], f"{tmp_path}/set", ShardConfig(samples_per_shard=16, workers=1), StorageConfig())
    return tmp_path / "set"


def findings(folder: Path, decode: Decode = "none") -> list[str]:
    checked = verify(str(folder), decode, StorageConfig(), workers=1)
    return [f"{finding.where}: {finding.what}" for finding in checked.findings]


def rows_of(folder: Path, shard: int) -> tuple[Path, list[dict[str, Any]]]:
    entry = Manifest.load(str(folder)).shards[shard]
    return folder / entry.name, pyarrow.parquet.read_table(folder / entry.index).to_pylist()


@pytest.mark.parametrize(("decode", "decoded"), [("none", 0), ("sample", 3), ("all", 40)])
def test_verify__finds_nothing_in_a_good_set(folder: Path, decode: Decode, decoded: int, s3: S3Server) -> None:
    bucket = s3.bucket()
    for path in folder.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), bucket, f"copy/{path.relative_to(folder)}")
    for url in (str(folder), f"s3://{bucket}/copy"):
        checked = verify(url, decode, s3.storage, workers=1)
        assert checked.findings == [] and checked.decoded == decoded and checked.manifest.rows == 40


def test_verify__names_the_crop_that_changed(folder: Path) -> None:
    tar, rows = rows_of(folder, 1)
    data = bytearray(tar.read_bytes())
    data[rows[5]["offset"] + 50] ^= 1
    tar.write_bytes(data)
    found = findings(folder)
    assert len(found) == 2 and "sha256" in found[0]
    assert rows[5]["key"] in found[1] and rows[5]["name"] in found[1] and "bytes changed" in found[1]


def test_verify__compares_headers_with_the_index(folder: Path) -> None:
    tar, rows = rows_of(folder, 0)
    data = bytearray(tar.read_bytes())
    one, two = (slice(rows[row]["offset"] - 512, rows[row]["offset"]) for row in (2, 3))
    data[one], data[two] = data[two], data[one]
    tar.write_bytes(data)
    found = findings(folder)
    assert len(found) == 3
    assert f"header before it is for {rows[3]['key']}.jpg" in found[1] and rows[2]["key"] in found[1]
    data[one] = bytes(512)
    tar.write_bytes(data)
    assert any("is no tar header" in line for line in findings(folder))


def test_verify__names_what_is_cut_or_missing(folder: Path) -> None:
    tar, rows = rows_of(folder, 0)
    tar.write_bytes(tar.read_bytes()[: rows[14]["offset"] + 10])
    found = findings(folder)
    assert "the manifest says" in found[0] and "end is missing" in found[1]
    assert all(rows[row]["key"] in line and "not in the tar" in line for row, line in ((14, found[2]), (15, found[3])))
    assert len(found) == 4
    tar.unlink()
    entry = Manifest.load(str(folder)).shards[1]
    (folder / entry.index).unlink()
    assert findings(folder) == [
        f"{tar.relative_to(folder)}: the tar is missing",
        f"{entry.index}: an index of the data set is missing",
    ]


def test_verify__finds_what_only_decoding_shows(tmp_path: Path) -> None:
    """Right checksums around bytes that are no image, and sizes in the index that are not the image's."""
    crops = crop_set.write(tmp_path / "set", 12, no_images=(4,))
    assert findings(crops.folder) == []
    found = findings(crops.folder, "all")
    assert len(found) == 12 and "cannot be decoded" in found[4] and "the index says 0x0" in found[0]


def test_verify__finds_a_key_that_occurs_twice(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 10)
    path = crops.folder / crops.manifest.file
    path.unlink()
    dataclasses.replace(crops.manifest, shards=crops.manifest.shards * 2).save(open_store(str(crops.folder)))
    assert len(findings(crops.folder)) == 10 and "occurs more than once" in findings(crops.folder)[0]


def test_verify__refuses_an_index_that_does_not_fit(folder: Path) -> None:
    manifest = Manifest.load(str(folder))
    entry = manifest.shards[0]
    sink = BytesIO()
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(folder / entry.index).slice(1), sink)
    (folder / entry.index).write_bytes(sink.getvalue())
    assert findings(folder) == [f"{entry.index}: an index of the data set is not the one that was written"]
    (folder / manifest.file).unlink()
    changed = dataclasses.replace(entry, index_sha256=hashlib.sha256(sink.getvalue()).hexdigest())
    dataclasses.replace(manifest, shards=(changed, *manifest.shards[1:])).save(open_store(str(folder)))
    assert findings(folder) == [f"{entry.index}: an index has 15 rows, the manifest says 16"]


def test_verify__refuses_a_manifest_that_was_changed(folder: Path) -> None:
    path = folder / "manifest-v0001.json"
    path.write_text(path.read_text().replace('"rows": 16', '"rows": 15', 1))
    with pytest.raises(DataError, match="does not match its own id"):
        findings(folder)
