"""What is passed over, not understood or of a test set is said by shard, its dry run and stats."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from datapipe.__main__ import main
from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.ingest.pipeline import ingest
from tests.datapipe.crop_set import jpegs

TEST_FOLDERS = "3 bounding_box_test, 2 query"


@pytest.fixture
def market(tmp_path: Path) -> Path:
    """A whole Market-1501 folder with files that are no images by their names."""
    crops = iter(jpegs(9))
    for folder, count in (("bounding_box_train", 4), ("bounding_box_test", 3), ("query", 2)):
        (tmp_path / "market" / folder).mkdir(parents=True)
        for number in range(count):
            name = f"{number:04d}_c1s1_{number:06d}_00.jpg"
            (tmp_path / "market" / folder / name).write_bytes(next(crops))
    for name in ("readme.txt", "a.heic", "b.HEIC"):
        (tmp_path / "market" / name).write_bytes(b"x")
    return tmp_path / "market"


def test_remarks__are_told_by_shard_dry_run_and_stats(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shard", str(market), "--out", str(tmp_path / "out"), "--workers", "1"]
    for command in ([*words, "--dry-run"], words, ["stats", str(tmp_path / "out")]):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert "passed over, no images by their names: 2 .heic, 1 .txt" in said, command
        assert f"crops of test folders are among them: {TEST_FOLDERS}" in said, command
    assert main(["stats", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["remarks"]["test_images"] == {"bounding_box_test": 3, "query": 2}


def test_remarks__of_one_folder_are_none(market: Path, tmp_path: Path) -> None:
    done = ingest([str(market / "query")], str(tmp_path / "out"), ShardConfig(workers=1), StorageConfig())
    assert not list(done.remarks.lines())


def test_remarks__count_labels_that_were_not_understood(tmp_path: Path) -> None:
    columns = {"image": pa.array(list(jpegs(4)), pa.binary()), "person": [True, False, True, None]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    done = ingest([str(tmp_path / "x.parquet")], str(tmp_path / "out"), ShardConfig(workers=1), StorageConfig())
    assert list(done.remarks.lines()) == ["labels that were not understood, left unknown: 3 person (true or false)"]
