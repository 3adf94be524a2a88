"""A run whose data, checkpoints, scores and report live on object storage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished, recipe, shards
from tests.training.checkpoint.toy import same, tensors
from training.checkpoint import read_marker


@pytest.mark.slow
def test_object_storage__the_whole_way(
    tmp_path: Path, s3: S3Server, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    bucket = s3.bucket()
    write_crops(tmp_path / "train", 40)
    for name, count in (("query", 8), ("bounding_box_test", 24)):
        write_crops(tmp_path / "crops" / name, count, seed=1)
    data = shards(tmp_path / "train", f"s3://{bucket}/shards", s3.storage)
    run = f"s3://{bucket}/runs/tiny"
    path = recipe(tmp_path, data.url, run, epochs=2.0)
    flags = ("--storage.endpoint-url", s3.endpoint)
    code, output, errors = finished(command("training", "pretrain", str(path), *flags))
    assert code == 0, errors
    assert "complete: 13 steps" in output
    for words in (
        ("training", "checkpoints", run),
        ("training", "evaluate", run, "--data", str(tmp_path / "crops")),
        ("training", "export", run),
        ("training", "report", run),
    ):
        code, output, errors = finished(command(*words, *flags))
        assert code == 0, errors
    kept = set(s3.objects(bucket))
    for name in ("config.toml", "log.txt", "metrics/attempt_001.jsonl", "checkpoints/step_0000013/checkpoint.json",
                 "exports/card.json", "evaluation/crops/random/metrics.json", "report.html"):  # fmt: skip
        assert f"runs/tiny/{name}" in kept
    store = open_store(run, s3.storage)
    assert store.read("metrics/attempt_001.jsonl").count(b'"loss":') == 13


@pytest.mark.slow
def test_object_storage__goes_on_from_there(
    tmp_path: Path, s3: S3Server, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    bucket = s3.bucket()
    write_crops(tmp_path / "crops", 40)
    data = shards(tmp_path / "crops", f"s3://{bucket}/shards", s3.storage)
    run = f"s3://{bucket}/run"
    path = recipe(tmp_path, data.url, run, epochs=2.0)
    flags = ("--storage.endpoint-url", s3.endpoint)
    assert finished(command("training", "pretrain", str(path), *flags))[0] == 0
    store = open_store(run, s3.storage).at("checkpoints")
    before = tensors(store, "step_0000013")
    part = f"step_0000013/{read_marker(store, 'step_0000013').files[0].name}"
    store.replace(part, store.read(part)[:-1])
    code, output, errors = finished(command("training", "pretrain", str(path), *flags))
    assert code == 0, errors
    assert "checkpoint step_0000013 is passed over" in output and "goes on from step_0000012" in output
    assert same(tensors(store, "step_0000013"), before)
