"""From crops to a data set: duplicates marked or left out, sidecars, spools elsewhere, and runs that only say it."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import webdataset

from datapipe.__main__ import main
from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.parallel import Workers
from datapipe.dataset.perceptual_hash import difference_hash
from datapipe.ingest import repartition, scan, work_units
from datapipe.ingest.pipeline import Ingested, ingest
from datapipe.ingest.shard_plan import rank, sample_key
from tests.conftest import S3Server
from tests.support.killing import local_objects

WriteCrops = Callable[..., dict[str, bytes]]


def shard(source: Path, out: Path, **settings: Any) -> Ingested:
    config = ShardConfig(**{"samples_per_shard": 16, "workers": 1, **settings})
    return ingest([str(source)], str(out), config, StorageConfig())


def rows(done: Ingested) -> dict[str, dict[str, Any]]:
    columns = ["key", "name", "sha256", "dhash", "duplicate_of", "near_of"]
    return {row["name"]: row for row in done.manifest.table(columns).to_pylist()}


@pytest.fixture
def doubled(tmp_path: Path, write_crops: WriteCrops) -> tuple[Path, dict[str, bytes]]:
    """Crops, five of which are there under three names."""
    crops = write_crops(tmp_path / "crops", 30)
    for name in list(crops)[:5]:
        for copy in ("again", "more"):
            (tmp_path / "crops" / f"{copy}-{name}").write_bytes(crops[name])
    return tmp_path / "crops", crops


def lots(crops: dict[str, bytes]) -> Iterator[list[str]]:
    """Names of equal crops, in the data set's order."""
    for name in list(crops)[:5]:
        yield sorted((name, f"again-{name}", f"more-{name}"), key=lambda other: rank(sample_key("crops", other), 0))


def test_ingest__marks_duplicates_and_keeps_them(doubled: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, crops = doubled
    found = rows(shard(folder, tmp_path / "out"))
    assert len(found) == 40
    expected: dict[str, str] = {}
    for first, *others in lots(crops):
        expected |= dict.fromkeys(others, sample_key("crops", first))
    assert {name: row["duplicate_of"] for name, row in found.items() if row["duplicate_of"]} == expected
    assert {name: row["near_of"] for name, row in found.items() if row["near_of"]}.items() >= expected.items()
    assert all(row["dhash"] == difference_hash((folder / name).read_bytes()) for name, row in found.items())


@pytest.mark.parametrize("exclude", ["exact", "near"])
def test_ingest__leaves_duplicates_out_and_says_so(
    doubled: tuple[Path, dict[str, bytes]], tmp_path: Path, exclude: str
) -> None:
    folder, crops = doubled
    done = shard(folder, tmp_path / "out", exclude=exclude)
    assert done.manifest.rows == 30 and done.reasons == {"exact duplicate": 10} and done.manifest.quarantined == 10
    listed = pyarrow.parquet.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {row["name"]: row["detail"] for row in listed} == {
        other: sample_key("crops", first) for first, *others in lots(crops) for other in others
    }
    assert not any(row["duplicate_of"] for row in rows(done).values())


def test_ingest__sidecars_carry_the_labels(doubled: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, crops = doubled
    done = shard(folder, tmp_path / "out", sidecars="json", shard_mb=0.03)
    assert len(done.manifest.shards) > 3 and all(entry.bytes <= 30_000 for entry in done.manifest.shards)
    urls = [f"{done.manifest.url}/{entry.name}" for entry in done.manifest.shards]
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = {sample["__key__"]: sample for sample in stream}
    assert len(samples) == 40
    for name, data in crops.items():
        sample = samples[sample_key("crops", name)]
        record = json.loads(sample["json"])
        assert sample["jpg"] == data and record["name"] == name and record["pid"] == int(name[:4])
        assert record["source"] == "crops" and record["track"] == -1
    again = ingest(urls, str(tmp_path / "again"), ShardConfig(workers=1), StorageConfig()).manifest
    assert again.rows == 40 and set(again.table(["pid"])["pid"].to_pylist()) == {int(name[:4]) for name in crops} | {-1}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["part", "segment", "crops", "chunk", "workers"])
def test_ingest__is_the_same_however_the_work_is_cut(
    doubled: tuple[Path, dict[str, bytes]], tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = doubled
    shard(folder, tmp_path / "one", samples_per_shard=3)
    places = {
        "part": (work_units, "PART_BYTES", 1),
        "segment": (scan, "SEGMENT_BYTES", 4_000),
        "crops": (scan, "MOST_CROPS", 3),
        "chunk": (repartition, "CHUNK", 7),
    }
    if setting in places:
        monkeypatch.setattr(*places[setting])
    monkeypatch.setattr("datapipe.sources.folder.UNIT_CROPS", 10)
    if setting == "workers":
        monkeypatch.setattr(work_units, "PART_BYTES", 1)
    shard(folder, tmp_path / "two", samples_per_shard=3, workers=2 if setting == "workers" else 1)
    assert local_objects(tmp_path / "one", "requests") == local_objects(tmp_path / "two", "requests")


def test_ingest__spools_on_s3(doubled: tuple[Path, dict[str, bytes]], tmp_path: Path, s3: S3Server) -> None:
    folder, _ = doubled
    bucket = s3.bucket()
    config = ShardConfig(samples_per_shard=16, workers=1, spool=f"s3://{bucket}/spool")
    done = ingest([str(folder)], f"{tmp_path}/out", config, s3.storage)
    assert done.manifest.id == shard(folder, tmp_path / "other").manifest.id
    assert s3.objects(bucket) == {} and not (tmp_path / "out" / ".spool").exists()


class Twice:
    """Workers that lose every result once: what was a task of a lost machine is done again elsewhere."""

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], *, count: int) -> Iterator[Any]:
        tasks = list(tasks)
        with Workers(1) as workers:
            list(workers.run(function, tasks, count=count))
            yield from workers.run(function, tasks, count=count)


def test_ingest__tasks_may_be_done_twice(doubled: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _ = doubled
    config = ShardConfig(samples_per_shard=16, workers=1)
    ingest([str(folder)], f"{tmp_path}/one", config, StorageConfig(), workers=Twice())
    shard(folder, tmp_path / "two")
    assert local_objects(tmp_path / "one") == local_objects(tmp_path / "two")


def test_ingest__refuses_two_crops_of_one_name(doubled: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, crops = doubled
    with webdataset.TarWriter(f"{tmp_path}/twice.tar") as writer:
        for name in [*crops, next(iter(crops))]:
            writer.write({"__key__": name.removesuffix(".jpg"), "jpg": crops[name]})
    with pytest.raises(DataError, match="same name") as caught:
        ingest([f"{tmp_path}/twice.tar"], f"{tmp_path}/out", ShardConfig(workers=1), StorageConfig())
    assert caught.value.where == f"twice.tar: {next(iter(crops))}"


def test_dry_run__says_what_would_be_done_and_writes_nothing(
    doubled: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = doubled
    words = ["shard", str(folder), "--out", f"{tmp_path}/out", "--workers", "1", "--samples-per-shard", "16"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "read about 40 crops" in said and "write about 3 shards" in said and "0.00% of the crops" in said
    assert main(words) == 0
    megabytes = capsys.readouterr().out.splitlines()[0].split(", ")[1].removesuffix(" MB")
    assert f"3 shards: {megabytes} MB" in said
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="cannot be opened"):
        main([*words, "--dry-run"])
