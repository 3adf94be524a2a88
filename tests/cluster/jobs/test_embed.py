"""Embedding on real Ray: what was killed goes on there, no piece is made twice, and the file is that of one process."""

import re
from pathlib import Path

import pyarrow.parquet
import pytest

from cluster.commands import embed
from cluster.core.job_paths import IN_JOB
from datapipe.core.errors import ConfigError
from tests.cluster.jobs.test_evaluate import killed
from tests.end_to_end.tiny import command, finished
from tests.training.commands.test_reproduce import weights
from tests.training.reid.people import market
from training.__main__ import main


def finished_pieces(folder: Path) -> dict[str, int]:
    """When each piece was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pieces-*/piece-*.parquet")}


@pytest.mark.slow
def test_embed__killed_and_started_again_makes_the_pieces_that_are_missing(tmp_path: Path) -> None:
    people, file, out = str(market(tmp_path / "people")), weights(tmp_path), tmp_path / "out"
    words = ("embed", file, "--data", people, "--embed-batch", "4", "--out")
    killed(("training", *words, str(out / "F.parquet")), lambda: finished_pieces(out))
    before = finished_pieces(out)
    assert before and not (out / "F.parquet").exists()
    code, output, errors = finished(command("cluster", *words, str(out / "F.parquet")))
    assert code == 0, output + errors
    said = re.search(r"(\d) of 3 pieces are there already", output)
    assert said and int(said[1]) >= len(before) and "73 rows" in output
    assert main([*words, str(tmp_path / "alone.parquet")]) == 0
    ours, alone = (pyarrow.parquet.read_table(path) for path in (out / "F.parquet", tmp_path / "alone.parquet"))
    assert ours.drop_columns("feature").equals(alone.drop_columns("feature"))
    near = zip(ours["feature"].to_pylist(), alone["feature"].to_pylist(), strict=True)
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in near)  # threads of PyTorch add up differently
    assert [path.name for path in out.iterdir()] == ["F.parquet"]


def test_embed__relative_places_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_JOB, "{}")
    with pytest.raises(ConfigError, match=r"relative paths in a Ray job(.|\n)*out = x.parquet"):
        embed(["s3://bucket/weights", "--data", "s3://bucket/people", "--out", "x.parquet"])
