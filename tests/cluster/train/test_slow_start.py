"""Starts on real clusters: one that takes longer than its patience as its store is slow, one that can never be."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.status import status
from datapipe.core.config import StorageConfig
from tests.cluster.local_nodes import Watched, local_nodes
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished, recipe, shards
from tests.support.faulty_proxy import FaultyProxy

PATIENCE_S, ANSWER_S = 12.0, 8.0
"""Seconds that a worker may stand still, and that each answer of the store takes."""


@pytest.mark.slow
def test_start__longer_than_its_patience_is_not_killed_while_bytes_come(
    tmp_path: Path, s3: S3Server, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", f"s3://{s3.bucket()}/set", s3.storage)
    path, asked = recipe(tmp_path, data.url, str(tmp_path / "run")), []  # type: ignore[var-annotated]

    def slowly(method: str, where: str) -> None:
        if starting:
            asked.append(where)
            time.sleep(ANSWER_S)

    starting = False
    with FaultyProxy(s3.endpoint, before=slowly) as proxy:
        run = Watched(command("cluster", "pretrain", str(path), "--cluster.start-timeout-s", str(PATIENCE_S),
                              "--storage.endpoint-url", proxy.endpoint, "--cluster.max-workers", "1"))  # fmt: skip
        run.until(lambda: "starts the workers" in run.lines)
        starting, began = True, time.monotonic()
        run.until(lambda: "builds pass with custom" in run.lines)
        took_s, starting = time.monotonic() - began, False
        code, output, errors = run.end()
    assert code == 0, output + errors
    assert asked and took_s > PATIENCE_S, "the start was not slower than the patience"
    assert "hung" not in output and "workers ended" not in output


@pytest.mark.slow
def test_start__that_no_machine_could_hold_ends_with_its_reason(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    with local_nodes(1) as cluster:
        code, output, errors = finished(command(
            "cluster", "pretrain", str(path), "--address", cluster.address, "--cluster.cpus-per-worker", "64",
            "--cluster.max-workers", "1", "--cluster.start-timeout-s", "6"))  # fmt: skip
    assert code == 1 and "Traceback" not in errors, output + errors
    reason = "a worker needs 64 CPU, and no machine of the cluster has more than 1 CPU"
    assert f"workers are not up yet: {reason}" in output
    assert f"no room for workers, and there will be none: {reason}" in errors
    assert status(str(tmp_path / "run"), StorageConfig()).state == "failed"
