"""A grid of evaluations by one command: every task on two data sets, killed and gone on with, followed, refused."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from cluster.jobs.evaluate import score_all
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError, UsageError
from tests.end_to_end import tiny
from tests.support.forked import call, forkserver
from tests.training.reid.people import market
from training.__main__ import main
from training.checkpoint import MARKER
from training.evaluation import evaluation, fine_tune
from training.grid.planning import GridRequest, WeightsList
from training.grid.request import NamedAddress, read_tasks

BOTH = [
    "--backbone.arch", "custom", "--backbone.size", "32", "16", "--backbone.patch", "8", "--backbone.width", "24",
    "--backbone.depth", "2", "--backbone.heads", "2", "--engine.threads", "1", "--engine.stepper", "plain",
    "--stream.threads", "1", "--optimisation.epochs", "2", "--optimisation.lr", "0.01",
    "--evaluation.every-epochs", "1", "--checkpoints.every-steps", "2", "--optimisation.precision", "fp32",
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
    assert "transfer:day" in report and "14 of 20 cells complete, 6 left out" in report
    files = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/cell.json")}
    assert main(words([pretrained, "drawn=random"], sets, tasks, out, *SETTINGS)) == 0
    assert f"{len(files)} of {len(files)} cells were complete before" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in files}


def started(arguments: list[str]) -> Any:
    """The command in a process of its own."""
    process = forkserver().Process(target=call, args=(dict(os.environ), main, arguments))
    process.start()
    return process


@pytest.mark.slow
def test_grid__killed_goes_on_with_the_cell_it_was_at(sets: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    """kill -9 while the second cell trains: the first stays as it is, the second goes on from its checkpoint, and all
    scores are those of a grid that was left alone."""
    arguments = [["drawn=random"], sets, "supervised,usl"]
    assert main(words(*arguments, tmp_path / "alone", *SETTINGS)) == 0  # type: ignore[arg-type]
    out = tmp_path / "killed"
    process = started(words(*arguments, out, *SETTINGS))  # type: ignore[arg-type]
    first, second = (out / "cells" / "drawn" / data / "supervised" for data in ("day", "night"))
    end = time.monotonic() + 300
    while not list((second / "checkpoints").glob(f"step_*/{MARKER}")) and process.is_alive():
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = (first / "cell.json").stat().st_mtime_ns
    assert not (second / "cell.json").exists()
    capsys.readouterr()
    assert main(words(*arguments, out, *SETTINGS)) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert (first / "cell.json").stat().st_mtime_ns == before and "goes on from step_" in said
    ours, theirs = rows(out), rows(tmp_path / "alone")
    for row in (*ours.values(), *theirs.values()):
        del row["seconds"]
    assert ours == theirs


@pytest.mark.slow
def test_grid__follows_a_run_and_scores_every_checkpoint(sets: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    toml = tiny.recipe(tmp_path, tiny.generated(tmp_path), str(run), epochs=4.0)
    training = started(["pretrain", str(toml), "--checkpoints.keep-last", "2", "--checkpoints.every-steps", "4"])
    end = time.monotonic() + 300
    while not list(run.glob(f"checkpoints/step_*/{MARKER}")):
        assert training.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    out = tmp_path / "grid"
    assert main(words([f"pass={run}"], sets, "zero-shot", out, "--every-checkpoint", "--follow")) == 0
    training.join()
    table = rows(out)
    last = max(row["step"] for row in table.values())
    assert last == 12 and f"{run} is complete" in capsys.readouterr().out
    assert {row["series"] for row in table.values()} == {"pass"} and len({row["epochs"] for row in table.values()}) > 1
    report = (out / "report.html").read_text()
    assert "mAP of zero-shot on day" in report and "epochs of pre-training" in report
    for folder in sorted(run.glob("checkpoints/step_*"))[:-1]:  # as if pruned since
        shutil.rmtree(folder)
    assert main(words([f"pass={run}"], sets, "zero-shot", out, "--every-checkpoint")) == 0
    assert rows(out).keys() == table.keys()


def pruning(run: Path, name: str, then: Callable[..., Any]) -> Callable[..., Any]:
    """A function before whose first call the run deletes a checkpoint, as far as it comes: the marker goes first."""
    marker = run / "checkpoints" / name / MARKER

    def call(*arguments: Any, **named: Any) -> Any:
        marker.unlink(missing_ok=True)
        return then(*arguments, **named)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("every", "gone", "left"), [(True, 0, [1, 2]), (False, 2, [1])])
def test_weights__pruned_between_their_listing_and_their_copying(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: bool, gone: int, left: list[int]
) -> None:
    """Of every checkpoint the others are taken; in the place of the newest the one that is by then."""
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    names = sorted(folder.name for folder in run.glob("checkpoints/step_*"))
    lines: list[str] = []
    address = NamedAddress("pass", str(run))
    request = GridRequest((address,), (), read_tasks("zero-shot"), str(tmp_path / "grid"), every_checkpoint=every)
    monkeypatch.setattr(fine_tune, "as_export", pruning(run, names[gone], fine_tune.as_export))
    assert [one.checkpoint for one in WeightsList(request, lines.append).all()] == [names[one] for one in left]
    assert any(f"{names[gone]} of {run} was pruned" in line for line in lines)
    named = replace(request, weights=(NamedAddress("one", f"{run}/checkpoints/{names[gone]}"),))
    with pytest.raises(DataError, match="no complete checkpoint"):  # a person's word is not passed over
        WeightsList(named, lines.append).all()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["training", "cluster"])
def test_zero_shot__of_a_checkpoint_that_its_run_prunes_meanwhile(
    pretrained: str, sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str
) -> None:
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    first, *others = sorted(folder.name for folder in run.glob("checkpoints/step_*"))
    if command == "training":
        monkeypatch.setattr(evaluation, "score", pruning(run, first, evaluation.score))
        assert main(["evaluate", str(run), "--data", sets[0]]) == 0
    else:
        tasks = evaluation.tasks(str(run), sets[0], StorageConfig())
        (run / "checkpoints" / first / MARKER).unlink()
        assert [one["weights"] for one in score_all(tasks, device="cpu")] == ["colour_histogram", "random", *others]
    assert f"{first} is left out: its run has pruned it" in capsys.readouterr().out
    scored = {path.parent.name for path in run.glob("evaluation/day/*/metrics.json")}
    assert scored == {"colour_histogram", "random", *others}


def test_dry_run__says_what_there_is_to_do_and_writes_nothing(
    pretrained: str, sets: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "grid"
    assert main(words([pretrained], sets, "zero-shot,uda:day", out, "--dry-run", *SETTINGS)) == 0
    said = capsys.readouterr().out
    assert "4 cells" in said and "/day/supervised: trains by supervised; may begin" in said
    assert "/night/uda-from-day: trains by cluster_contrast; after cells/first@step_0000009/day/supervised" in said
    assert said.count("steps of an epoch") == 2 and "differs from what is published (uda_pass_market)" in said
    assert not out.exists()
    assert main(["evaluate", "random", "--data", sets[0], "--tasks", "supervised", "--dry-run"]) == 0
    assert "differs from what is published (supervised)" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "what"), [
    (("--tasks", "uda:noon"), "no data set is called noon"),
    (("--tasks", "zero-shot,nonsense"), "no task is called 'nonsense'"),
    (("--tasks", "zero-shot", "--usl.method.iterations", "3"), "no flag"),
    (("--tasks", "usl", "--label-fraction", ".5"), "only fine-tuning with labels"),
    (("--tasks", "zero-shot", "--follow"), "--follow is for --every-checkpoint"),
    (("--tasks", "usl", "--method.no-such-key", "3"), "no flag `--method.no-such-key`"),
    (("--tasks", "usl", "--usl.method.clustering.k1", "400"), "fewer than the 400 neighbours"),
    (("--tasks", "zero-shot", "--data-name", "own"), "one name for several data sets"),
])  # fmt: skip
def test_grid__mistakes_are_met_before_any_work(
    sets: tuple[str, str], tmp_path: Path, arguments: tuple[str, ...], what: str
) -> None:
    out = tmp_path / "grid"
    with pytest.raises((ConfigError, DataError, UsageError), match=what):
        main(words(["random"], sets, "usl", out, *(SETTINGS if "usl" in arguments else ()), *arguments))
    assert not (out / "cells").exists()


def test_grid__several_evaluations_need_a_folder_and_names(sets: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several evaluations need a folder"):
        main(["evaluate", "random", "--data", sets[0], "--data", sets[1], "--tasks", "usl"])
    with pytest.raises(ConfigError, match="two data sets are called"):
        main(["evaluate", "random", "--data", sets[0], "--data", sets[0], "--tasks", "usl", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="several weights are called random"):
        main(words(["random", "random"], sets, "usl", tmp_path / "grid", *SETTINGS))
    with pytest.raises(DataError, match="no data set of people"):
        (tmp_path / "empty").mkdir()
        main(["evaluate", "random", "--data", str(tmp_path / "empty"), "--data", sets[0], "--tasks", "usl", "--out",
              str(tmp_path / "x")])  # fmt: skip
