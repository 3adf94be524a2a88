"""The measurement of growth measures real work; how long that takes is no test's business."""

from pathlib import Path

import pytest

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.ingest.pipeline import ingest_sources
from tests.bench import growth
from tests.bench.growth import COPIES, RepeatedCrops, opened, plan
from tests.bench.scale import Scale
from tests.datapipe.crop_set import jpegs


def test_growth__plans_crops_with_duplicates_of_both_kinds() -> None:
    grown = plan(20_000)
    assert grown.rows == 20_000 and grown.cpu_s > 0 and grown.peak_mb > 0
    assert grown.what.startswith(f"2 shards, {int(COPIES * 20_000):,} exact and {int(COPIES * 20_000):,} near")


def test_growth__repeats_crops_under_new_names(tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    for number, data in enumerate(jpegs(3)):
        (tmp_path / "crops" / f"{number}.jpg").write_bytes(data)
    source = RepeatedCrops(str(tmp_path / "crops"), 10)
    done = ingest_sources([source], str(tmp_path / "out"), ShardConfig(workers=1), StorageConfig())
    found = done.manifest.table(["key", "sha256", "duplicate_of"])
    assert len(set(found["key"].to_pylist())) == 10 and len(set(found["sha256"].to_pylist())) == 3
    assert found["duplicate_of"].null_count == 3


@pytest.mark.slow
def test_growth__opens_what_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "cache", tmp_path)
    monkeypatch.setattr(growth, "RANKS", 2)
    grown = opened(210_000)
    assert grown.rows == 210_000 and grown.cpu_s > 0 and grown.what.startswith("that was packing into 4 MB")
    assert list(tmp_path.iterdir()) == []
