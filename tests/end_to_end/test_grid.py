"""A grid of evaluations by one command: every task on two data sets, killed and gone on with, followed, refused."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from datapipe.core.errors import ConfigError, DataError, UsageError
from tests.end_to_end import tiny
from tests.end_to_end.test_usl import TINY
from tests.support.forked import call, forkserver
from tests.training.reid.people import market
from training.__main__ import main

BOTH = [
    "--backbone.arch", "custom", "--backbone.size", "32", "16", "--backbone.patch", "8", "--backbone.width", "24",
    "--backbone.depth", "2", "--backbone.heads", "2", "--engine.threads", "1", "--engine.stepper", "plain",
    "--stream.threads", "1", "--optimisation.epochs", "2", "--optimisation.lr", "0.01", "--evaluation.every-epochs", "1",
    "--checkpoints.every-steps", "2", "--optimisation.precision", "fp32",
]  # fmt: skip
LABELS = ["--supervised.optimisation.batch", "8", "--supervised.method.instances", "2",
          "--supervised.optimisation.warmup-epochs", "0"]  # fmt: skip
CLUSTERS = ["--optimisation.batch", "12", "--optimisation.micro-batch", "6", "--method.iterations", "3",
            "--method.instances", "3", "--method.norm-group", "6", "--method.clustering.k1", "6",
            "--method.clustering.k2", "2", "--method.clustering.min-samples", "2"]  # fmt: skip
SETTINGS = [*BOTH, *LABELS, *(word.replace("--", f"--{kind}.", 1) if word.startswith("--") else word
                              for kind in ("usl", "uda") for word in CLUSTERS)]  # fmt: skip
"""Small settings of all kinds of training."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return str(market(folder / "day", identities=16, images=1)), str(market(folder / "night", identities=8, images=2))


def words(weights: list[str], sets: tuple[str, str], tasks: str, out: Path, *more: str) -> list[str]:
    data = ["--data", f"day={sets[0]}", "--data", f"night={sets[1]}"]
    return ["evaluate", *weights, *data, "--tasks", tasks, "--out", str(out), "--device", "cpu", *more]


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of the table by cell; the three files agree."""
    listed: list[dict[str, Any]] = json.loads((out / "table.json").read_text())["rows"]
    assert pyarrow.parquet.read_table(out / "table.parquet").to_pylist() == listed
    assert (out / "table.md").read_text().count("\n") == len(listed) + 2
    return {f"{row['weights']} {row['task']} {row['data']}": row for row in listed}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, sets: tuple[str, str]) -> str:
    """A run of pre-training with part tokens and three checkpoints."""
    folder = tmp_path_factory.mktemp("pretrained")
    run = folder / "first"
    toml = tiny.recipe(folder, tiny.generated(folder), str(run), epochs=3.0)
    assert main(["pretrain", str(toml), "--checkpoints.keep-last", "3"]) == 0
    return str(run)


@pytest.mark.slow
def test_grid__every_task_by_one_command(pretrained: str, sets: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "grid"
    tasks = "zero-shot,supervised,usl,uda:day,transfer:day"
    assert main(words([pretrained, "drawn=random"], sets, tasks, out, *SETTINGS)) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    table = rows(out)
    name = next(key.partition(" ")[0] for key in table if key.startswith("first@"))
    cells = {
        key.removeprefix(f"{name} ") for key in table if key.startswith(name) and table[key]["state"] == "complete"
    }
    assert cells == {"zero-shot day", "zero-shot night", "supervised day", "supervised night", "usl day", "usl night",
                     "uda:day night", "transfer:day night"}  # fmt: skip
    assert all(0 < row["mAP"] <= 100 for row in table.values() if row["state"] == "complete")
    left_out = {key: row["why"] for key, row in table.items() if row["state"] == "left out"}
    assert left_out[f"{name} uda:day day"] == "it is the source" and "leaves out uda:day of" in said
    assert "random weights are scored beside" in left_out["drawn zero-shot day"]
    adapted = json.loads((out / "cells" / name / "night" / "uda-from-day" / "cell.json").read_text())
    model = adapted["metrics"]["settings"]["model"]
    assert (model["task"], model["source"], model["family"]) == ("uda", "day", "pass")
    transferred = table[f"{name} transfer:day night"]
    scored = json.loads((out / "cells" / name / "night" / "transfer-from-day" / "cell.json").read_text())
    source = json.loads((out / "cells" / name / "day" / "supervised" / "cell.json").read_text())
    assert (
        scored["metrics"]["settings"]["model"]["task"] == "supervised"
        and transferred["rule"] == "the weights as they are"
    )
    assert source["metrics"]["settings"]["model"]["task"] == "supervised"
    report = (out / "report.html").read_text()
    assert "transfer:day" in report and "complete" in report and "PASS README" in report
    files = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/cell.json")}
    assert main(words([pretrained, "drawn=random"], sets, tasks, out, *SETTINGS)) == 0
    assert f"{len(files)} of {len(files)} cells were complete before" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in files}
