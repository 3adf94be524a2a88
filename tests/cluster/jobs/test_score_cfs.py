"""Forgetting scores on real Ray: pieces that are there are not made again, and the list is that of one process."""

from pathlib import Path

import pyarrow.parquet
import pytest

from cluster.commands import score_cfs
from cluster.core.job_paths import IN_JOB
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.core.parallel import Workers
from tests.end_to_end.tiny import command, finished, generated
from tests.training.evaluation.test_forgetting import NOTE, network
from training.evaluation import forgetting
from training.evaluation.forgetting import ForgettingRequest


@pytest.mark.slow
def test_score_cfs__goes_on_with_what_is_there(tmp_path: Path) -> None:
    source, target, shards = network(tmp_path, "source", 0), network(tmp_path, "target", 1), generated(tmp_path)
    request = ForgettingRequest(source=source, target=target, data=shards, storage=StorageConfig())
    alone, begun = (
        forgetting.plan(request, str(tmp_path / out), tuned_on="market1501") for out in ("alone", "out")
    )  # fmt: skip
    assert alone and begun and len(begun.data.pieces) == 2  # 17 crops and one: a piece for each shard
    forgetting.score_piece(begun.task(begun.data.pieces[1]))
    words = ("score-cfs", source, target, "--data", shards, "--out", str(tmp_path / "out"), "--tuned-on", "market1501")
    code, output, errors = finished(command("cluster", *words))
    assert code == 0, output + errors
    assert "1 of 2 pieces are there already" in output and f"note: {NOTE}" in output
    assert output.splitlines()[-2:] == [f"{tmp_path}/out/scores.cfs.parquet", f"{tmp_path}/out/names.txt"]
    forgetting.carry_out(alone, Workers(1), forgetting.score_piece, "cpu")
    ours, theirs = (pyarrow.parquet.read_table(tmp_path / out / "scores.cfs.parquet") for out in ("out", "alone"))
    assert ours["score"].to_pylist() == pytest.approx(theirs["score"].to_pylist(), abs=1e-6)
    assert sorted(ours["key"].to_pylist()) == sorted(theirs["key"].to_pylist())
    assert score_cfs([*words[1:]]) == 0  # complete: no Ray is started


def test_score_cfs__relative_places_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_JOB, "{}")
    with pytest.raises(ConfigError, match=r"relative paths in a Ray job(.|\n)*target = runs/tuned"):
        score_cfs(["s3://b/source", "runs/tuned", "--data", "s3://b/set", "--out", "s3://b/out"])
