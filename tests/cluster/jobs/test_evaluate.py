"""Evaluation on real Ray: killed at once and started again, nothing complete is done twice."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.commands import evaluate
from cluster.core.arguments import EvaluateJob
from cluster.core.job_paths import IN_JOB
from datapipe.core.cli import read_some
from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import command, finished, generated, recipe
from tests.support.warm_python import descendants
from tests.training.commands.test_reproduce import RECIPE, weights
from tests.training.reid.people import market
from training.__main__ import main

PATIENCE_S = 600
LINE = "\n[checkpoints]\nevery_steps = 1\n[backbone]\nsize = [64, 32]\n[evaluation]\nevery_epochs = 4\n"


def killed(words: tuple[str, ...], begun: Callable[[], Any]) -> None:
    """Start the command, and kill it with all its processes once something is there."""
    process = command(*words)
    end = time.monotonic() + PATIENCE_S
    try:
        while not begun():
            assert process.poll() is None or begun(), finished(process)
            assert time.monotonic() < end, "nothing came"
            time.sleep(0.01)
    finally:
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(process.pid), *descendants(process.pid)]
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(tree, timeout=PATIENCE_S)
        process.communicate()


def written(folder: Path) -> dict[Path, int]:
    """When each complete score was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("evaluation/*/*/metrics.json")}


@pytest.mark.slow
def test_evaluate__killed_and_started_again_scores_what_is_missing(tmp_path: Path) -> None:
    run, people = tmp_path / "run", str(market(tmp_path / "people"))
    assert main(["pretrain", str(recipe(tmp_path, generated(tmp_path), str(run), epochs=2.0))]) == 0
    words = ("cluster", "evaluate", str(run), "--data", people)
    killed(words, lambda: written(run))
    before = written(run)
    assert 0 < len(before) < 4  # histogram, random weights, two checkpoints
    code, output, errors = finished(command(*words))
    assert code == 0, output + errors
    after = written(run)
    assert len(after) == 4 and {path: after[path] for path in before} == before
    assert "(4 of 4)" in output and output.splitlines()[-1] == str(run / "report.html")
    scores = json.loads((run / "evaluation" / "people" / "step_0000006" / "metrics.json").read_text())
    assert scores["settings"]["model"]["family"] == "pass" and len(scores["settings"]["model"]["sha256"]) == 64


@pytest.mark.slow
def test_evaluate_supervised__killed_and_started_again_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text(RECIPE + LINE)
    out, people = tmp_path / "out", str(market(tmp_path / "people"))
    words = ("cluster", "evaluate", weights(tmp_path), "--data", people, "--tasks", "supervised", "--out", str(out),
             "--recipe", str(tmp_path / "short.toml"), "--optimisation.epochs", "12")  # fmt: skip
    killed(words, lambda: written(out))
    before = written(out)
    assert len(before) == 1 and not (out / "report.html").exists()
    code, output, errors = finished(command(*words))
    assert code == 0, output + errors
    after = written(out)
    assert len(after) == 3 and {path: after[path] for path in before} == before
    assert "goes on from step_" in output and "result: step_" in output and (out / "report.html").is_file()
    code, output, errors = finished(command(*words))
    assert code == 0 and "done before" in output, output + errors
    assert written(out) == after


def test_evaluate__takes_what_the_local_command_takes_and_flags_of_a_recipe() -> None:
    chosen, flags = read_some(EvaluateJob, ["random", "--data", "people", "--tasks", "supervised", "--out",
                               "s3://b/x", "--address", "local", "--optimisation.epochs", "3"], prog="")  # fmt: skip
    assert (chosen.task, chosen.address, flags) == ("supervised", "local", ["--optimisation.epochs", "3"])
    assert chosen.places == {"data": "people", "out": "s3://b/x"}


def test_evaluate__relative_places_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_JOB, "{}")
    with pytest.raises(ConfigError, match=r"relative paths in a Ray job(.|\n)*weights = runs/x, data = people"):
        evaluate(["runs/x", "--data", "people", "--out", "s3://bucket/scores"])


@pytest.mark.slow
def test_evaluate__mistakes_are_met_before_ray_starts(tmp_path: Path) -> None:
    people = str(market(tmp_path / "people"))
    with pytest.raises(ConfigError, match="scores of a file need a folder"):
        evaluate([weights(tmp_path), "--data", people])
    with pytest.raises(ConfigError, match="no flag `--optimisation.epochs`"):
        evaluate([weights(tmp_path), "--data", people, "--out", str(tmp_path / "x"), "--optimisation.epochs", "3"])
