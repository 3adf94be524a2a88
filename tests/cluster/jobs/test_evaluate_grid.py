"""A grid on real Ray: a cell whose worker is killed goes on from its checkpoint while the others go on; the scores are
those of one process."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from datapipe.core.errors import ConfigError
from tests.end_to_end.test_grid import SETTINGS, rows, words
from tests.end_to_end.tiny import command, finished
from tests.support.warm_python import descendants
from tests.training.reid.people import market
from training.__main__ import main
from training.checkpoint import MARKER

PATIENCE_S = 600


def workers(pid: int) -> list[psutil.Process]:
    """Processes of the command that carry out a cell now."""
    listed = []
    for process in descendants(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] == ["ray::_carry_out"]:
                listed.append(process)
    return listed


def without_seconds(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in table.items()}


@pytest.mark.slow
def test_grid__a_killed_worker_costs_its_cell_a_checkpoint_interval(tmp_path: Path) -> None:
    """kill -9 of all processes that carry out cells, while one trains without labels."""
    sets = (
        str(market(tmp_path / "day", identities=16, images=1)),
        str(market(tmp_path / "night", identities=8, images=2)),
    )
    asked: tuple[Any, ...] = (["drawn=random"], sets, "usl,transfer:day")
    settings = [*SETTINGS, "--usl.method.iterations", "16", "--usl.optimisation.lr", "1e-4"]
    assert main(words(*asked, tmp_path / "alone", *settings)) == 0
    out = tmp_path / "grid"
    process = command("cluster", *words(*asked, out, *settings))
    cell, end = out / "cells" / "drawn" / "day" / "usl", time.monotonic() + PATIENCE_S
    while not list(cell.glob(f"checkpoints/step_*/{MARKER}")):
        assert process.poll() is None and time.monotonic() < end, finished(process)
        time.sleep(0.005)
    for one in workers(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(one.pid, signal.SIGKILL)
    code, output, errors = finished(process)
    assert code == 0, output + errors
    assert without_seconds(rows(out)) == without_seconds(rows(tmp_path / "alone"))
    assert f"{cell.relative_to(out)}: cluster_contrast goes on from step_" in errors, errors
    assert "transfer:day" in (out / "report.html").read_text()


def test_grid__relative_places_are_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.commands import evaluate
    from cluster.core.job_paths import IN_JOB

    monkeypatch.setenv(IN_JOB, "{}")
    with pytest.raises(ConfigError, match=r"weights 2 = runs/x, data 1 = people, data 2 = others"):
        evaluate(["a=s3://b/w", "runs/x", "--data", "day=people", "--data", "others", "--out", "s3://bucket/scores"])
