"""Embedding on real Ray: what was killed goes on there, no piece is made twice, and the file is that of one process."""

import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest

from cluster.commands import embed, evaluate
from cluster.core.job_paths import IN_JOB
from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import command, finished
from tests.support.golden import ROOT
from tests.support.warm_python import Process, python
from tests.training.commands.test_reproduce import weights
from tests.training.reid.people import market
from training.__main__ import main

KILLED = """
import os, signal, sys
from training.__main__ import main
from training.commands import embed

work = embed.embed_piece

def dies(task, device):
    if task.piece.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(task, device)

embed.embed_piece = dies
main(sys.argv[1:])
"""
"""The command on one machine, killed when it comes to the last piece."""


@pytest.mark.slow
def test_embed__killed_elsewhere_goes_on_with_the_pieces_that_are_missing(tmp_path: Path) -> None:
    people, file, out = str(market(tmp_path / "people")), weights(tmp_path), tmp_path / "out"
    words = ("embed", file, "--data", people, "--embed-batch", "4", "--out")
    killed = [python(), "-c", KILLED, *words, str(out / "F.parquet")]
    assert Process(killed, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE).wait() == -9
    (pieces,) = out.iterdir()
    assert pieces.name.startswith("F.parquet.pieces-") and len(list(pieces.iterdir())) == 2
    code, output, errors = finished(command("cluster", *words, str(out / "F.parquet")))
    assert code == 0, output + errors
    assert "2 of 3 pieces are there already" in output and "73 rows" in output
    assert main([*words, str(tmp_path / "alone.parquet")]) == 0
    ours, alone = (pyarrow.parquet.read_table(path) for path in (out / "F.parquet", tmp_path / "alone.parquet"))
    assert ours.drop_columns("feature").equals(alone.drop_columns("feature"))
    near = zip(ours["feature"].to_pylist(), alone["feature"].to_pylist(), strict=True)
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in near)  # threads of PyTorch add up differently
    assert [path.name for path in out.iterdir()] == ["F.parquet"]
    scores = ["--features", str(out / "F.parquet"), "--data", people, "--out", str(tmp_path / "scores")]
    assert evaluate(scores) == 0 and (tmp_path / "scores/evaluation/people/weights/metrics.json").is_file()


def test_embed__relative_places_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_JOB, "{}")
    with pytest.raises(ConfigError, match=r"relative paths in a Ray job(.|\n)*out = x.parquet"):
        embed(["s3://bucket/weights", "--data", "s3://bucket/people", "--out", "x.parquet"])
