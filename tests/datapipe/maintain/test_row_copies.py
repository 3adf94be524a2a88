"""A removed crop leaves files of features, scores and pseudo labels; the other rows stay as they were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datapipe.commands.maintain import remove as command
from datapipe.core.config import RemoveConfig, ShardConfig, StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.maintain import remove as removal
from datapipe.maintain.derived_copies import Cleared
from datapipe.maintain.remove import remove
from datapipe.maintain.row_copies import RemovedCrops
from tests.conftest import S3Server

STORAGE = StorageConfig()


@pytest.fixture
def folder(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 12 crops in three shards, on a machine whose cache is its own."""
    write_crops(tmp_path / "crops", 12)
    ingest([f"{tmp_path}/crops"], f"{tmp_path}/set", ShardConfig(samples_per_shard=4, workers=1), STORAGE)
    monkeypatch.setattr(removal, "default_folder", lambda: f"{tmp_path}/own-cache")
    return tmp_path / "set"


def crops(folder: Path) -> pyarrow.Table:
    return Manifest.load(str(folder)).table(["key", "name"])


def features(table: pyarrow.Table, path: Path, *, half: bool = True) -> pyarrow.Table:
    """A file with a feature of each crop, in groups of five rows, and with metadata."""
    kind = pyarrow.list_(pyarrow.field("element", pyarrow.float16() if half else pyarrow.float32(), nullable=False), 2)
    values = pyarrow.array(np.arange(2 * len(table), dtype=np.float16 if half else np.float32))
    made = table.append_column("feature", pyarrow.FixedSizeListArray.from_arrays(values, type=kind))
    made = made.replace_schema_metadata({"reid_features": '{"format": 1}'})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(made, path, row_group_size=5, compression="zstd", use_dictionary=["key"])
    return made


def take_out(folder: Path, *runs: object, names: list[str], storage: StorageConfig = STORAGE) -> Cleared:
    (folder.parent / "list").write_text("\n".join(names))
    config = RemoveConfig(names=f"{folder.parent}/list", runs=tuple(map(str, runs)), workers=1)
    return remove(str(folder), config, storage).cleared


def test_rows__of_removed_crops_go_and_all_else_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = crops(folder)
    whole = {name: features(table, tmp_path / "out" / name) for name in ("F.parquet", "deep/er/G.parquet")}
    run = tmp_path / "out" / "run"
    for name, column in {"source.cfs.parquet": "score", "pseudo_labels/epoch_0003.parquet": "label"}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        whole[f"run/{name}"] = table.append_column(column, pyarrow.array(range(len(table))))
        pyarrow.parquet.write_table(whole[f"run/{name}"], run / name)
    gone = [table["name"][row].as_py() for row in (1, 2, 7)]
    (tmp_path / "list").write_text("\n".join(gone))
    words = [str(folder), "--names", str(tmp_path / "list"), "--runs", str(tmp_path / "out"), "--workers", "1"]
    assert command(words) == 0
    left = pyarrow.array(row not in (1, 2, 7) for row in range(12))
    for name, before in whole.items():
        after = pyarrow.parquet.ParquetFile(tmp_path / "out" / name)
        assert after.read().equals(before.filter(left)) and after.schema_arrow.equals(before.schema)
        assert (after.schema_arrow.metadata or {}) == (before.schema.metadata or {})
    said = capsys.readouterr().out
    assert all(f"deleted 3 rows of {tmp_path}/out/{name}" in said for name in whole) and "remains" not in said


def test_rows__are_found_again_by_the_record_of_the_removal(folder: Path, tmp_path: Path) -> None:
    """When the crops are gone, the list of names alone does not tell their keys."""
    table = crops(folder)
    name = table["name"][0].as_py()
    take_out(folder, names=[name])
    features(table, tmp_path / "late" / "F.parquet")
    assert take_out(folder, tmp_path / "late", names=[name]).shortened == [f"1 row of {tmp_path}/late/F.parquet"]
    assert len(pyarrow.parquet.read_table(tmp_path / "late" / "F.parquet")) == 11
    written = (tmp_path / "late" / "F.parquet").stat().st_mtime_ns
    assert take_out(folder, tmp_path / "late", names=[name]).shortened == []
    assert (tmp_path / "late" / "F.parquet").stat().st_mtime_ns == written


def test_rows__of_other_sources_with_the_same_name_stay(folder: Path, tmp_path: Path) -> None:
    table = crops(folder).slice(0, 2)
    same = pyarrow.table({"key": [table["key"][0].as_py(), "0" * 32], "name": [table["name"][0].as_py()] * 2})
    features(same, tmp_path / "out" / "F.parquet")
    take_out(folder, tmp_path / "out", names=[table["name"][0].as_py()])
    assert pyarrow.parquet.read_table(tmp_path / "out" / "F.parquet")["key"].to_pylist() == ["0" * 32]


@pytest.mark.parametrize(
    ("row", "removed", "goes"),
    [
        ("query/a.jpg", "query/a.jpg", True),
        ("query/a.jpg", "a.jpg", True),
        ("a.jpg", "set/query/a.jpg", True),
        ("cam1/a.jpg", "cam2/a.jpg", False),
        ("xa.jpg", "a.jpg", False),
        (".\\query\\a.jpg", "query/a.jpg", True),
    ],
)
def test_rows__of_loose_files_are_judged_by_their_paths(row: str, removed: str, goes: bool) -> None:
    found = RemovedCrops([removed], [])
    for column in ("key", "name"):
        assert found.mask(pyarrow.table({column: [row, "other.jpg"]})).tolist() == [goes, False]


def test_tables__without_a_row_left_go_and_what_is_not_known_is_listed(folder: Path, tmp_path: Path) -> None:
    table, out = crops(folder), tmp_path / "out"
    features(table.slice(0, 1), out / "one.parquet", half=False)
    pyarrow.parquet.write_table(table, out / "list.parquet")
    index = out / "run" / "shards" / "shards" / "x.parquet"
    index.parent.mkdir(parents=True)
    index.write_bytes(next((folder / "shards").glob("*.parquet")).read_bytes())
    held = pyarrow.parquet.read_table(index)
    (out / "broken.parquet").write_bytes(b"PAR1")
    (out / ".F.parquet.0123.part").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"row": [1]}), out / "numbers.parquet")
    cleared = take_out(folder, out, names=[table["name"][0].as_py()])
    assert cleared.deleted == [f"{out}/one.parquet"] and not cleared.shortened and not cleared.failed
    listed = [what.partition(": ") for what in cleared.remaining]
    expected = {"broken.parquet": "it cannot be read as parquet", "list.parquet": "1 row of removed crops",
                ".F.parquet.0123.part": "half-written by a command that was killed"}  # fmt: skip
    if table["key"][0].as_py() in held["key"].to_pylist():
        expected["run/shards/shards/x.parquet"] = "1 row of removed crops"
    assert {path.removeprefix(f"{out}/") for path, _, _ in listed} == {*expected}
    assert all(why.startswith(expected[path.removeprefix(f"{out}/")]) for path, _, why in listed)
    assert pyarrow.parquet.read_table(index).equals(held)


@pytest.mark.slow
def test_rows__on_an_object_store(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    bucket, table = s3.bucket(), crops(folder)
    whole = features(table, tmp_path / "F.parquet")
    s3.client.upload_file(str(tmp_path / "F.parquet"), bucket, "features/F.parquet")
    take_out(folder, f"s3://{bucket}/features", names=[table["name"][3].as_py()], storage=s3.storage)
    (data,) = s3.objects(bucket).values()
    left = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    assert left.equals(pyarrow.concat_tables([whole.slice(0, 3), whole.slice(4)]))
