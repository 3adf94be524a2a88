"""A method of another package, one file and an entry point, through all commands: nothing else knows of it."""

import json
import os
import signal
import tomllib
from pathlib import Path

import pytest

from datapipe.core import cli
from tests.end_to_end.pause import Pause
from tests.end_to_end.tiny import command, final_state, finished, generated, step_records
from tests.training.methods.foreign_package import environment, package
from tests.training.reid.people import market
from training.methods import GROUP

RECIPE = """
out = "{out}"
seed = 3
[stream]
manifest = "{manifest}"
block = 4
window = 3
threads = 1
[backbone]
arch = "custom"
size = [64, 32]
patch = 8
width = 24
depth = 2
heads = 2
[method]
name = "colours"
[optimisation]
epochs = 2.0
batch = 6
micro_batch = 3
lr = 2e-3
precision = "fp32"
[engine]
stepper = "plain"
device = "cpu"
threads = 1
audit = true
[checkpoints]
every_steps = 3
"""
STEPS = 6
ALL_COMMANDS = (
    "import sys, json; from datapipe.core.cli import run; from training.__main__ import main; "
    "sys.exit(max(run(main, words) for words in json.loads(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Package, recipe `colours.toml` of 6 steps into run/, and a labelled data set in people/."""
    folder = tmp_path_factory.mktemp("foreign")
    package(folder)
    (folder / "colours.toml").write_text(RECIPE.format(out=folder / "run", manifest=generated(folder)))
    market(folder / "people")
    return folder


@pytest.mark.slow
def test_foreign_method__pre_trains_stopped_and_resumed_and_under_ray_with_deepspeed(place: Path) -> None:
    recipe, pause = str(place / "colours.toml"), Pause(place, 4)
    stopped = command("tests.end_to_end.pause", "training", "pretrain", recipe, cold=True,
                      **{**pause.environment, **environment(place)})  # fmt: skip
    os.kill(pause.reached(stopped), signal.SIGTERM)
    pause.end()
    assert finished(stopped)[0] == cli.STOPPED
    undisturbed, under_ray = place / "undisturbed", place / "under_ray"
    process = command("cluster", "pretrain", recipe, "--out", str(under_ray), "--cluster.max-workers", "1",
                      "--engine.stepper", "deepspeed", cold=True, **environment(place))  # fmt: skip
    lines = ["pretrain", str(place / "run" / "config.toml")], ["pretrain", recipe, "--out", str(undisturbed)]
    for code, output, errors in (together(place, *lines), finished(process)):
        assert code == 0, output + errors
    before, after = final_state(undisturbed), final_state(place / "run")
    assert before.keys() == after.keys() and all(value.equal(after[name]) for name, value in before.items())
    losses, same = ([record["loss"] for record in step_records(run)] for run in (undisturbed, under_ray))
    assert len(losses) == STEPS and losses[-1] < losses[0] and same == pytest.approx(losses, rel=1e-4)
    assert all("loss_colour" in record for record in step_records(place / "run", 2))
    told = json.loads((place / "run" / "environment.json").read_text())
    assert told["versions"]["colours"] == "0.1"


def together(folder: Path, *lines: list[str]) -> tuple[int, str, str]:
    """(highest exit code, output, errors) of several commands, one after the other in one process."""
    script = folder / "commands.py"
    script.write_text(ALL_COMMANDS)
    return finished(command("commands", json.dumps(lines), cold=True, **environment(folder)))


@pytest.mark.slow
def test_foreign_method__dry_run_evaluation_export_and_report(place: Path, tmp_path: Path) -> None:
    recipe, run, people = str(place / "colours.toml"), str(tmp_path / "run"), str(place / "people")
    export = str(tmp_path / "export")
    code, output, errors = together(
        place,
        ["pretrain", recipe, "--dry-run"],
        ["pretrain", recipe, "--out", run, "--method.pad", "4", "--evaluation.data", people],
        ["evaluate", run, "--data", people],
        ["export", run, "--out", export],
        ["evaluate", export, "--data", people, "--out", str(tmp_path / "scores")],
        ["evaluate", export, "--data", people, "--tasks", "supervised", "--out", str(tmp_path / "tuned"),
         "--optimisation.epochs", "1", "--optimisation.warmup-epochs", "0", "--optimisation.precision", "fp32",
         "--optimisation.batch", "8", "--backbone.size", "64", "32"],
        ["report", run],
    )  # fmt: skip
    assert code == 0, output + errors
    assert "not all of it is counted" in output and "nothing is published of this method" in output
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["method"] == {"name": "colours", "pad": 4}
    card = json.loads((tmp_path / "export" / "card.json").read_text())
    assert (card["method"], card["versions"]["colours"]) == ("colours", "0.1")
    scores = [json.loads(path.read_text()) for path in tmp_path.rglob("metrics.json")]
    assert {(one["weights"], one["headline"]) for one in scores} >= {("exported", "cls"), ("random", "cls")}
    tuned = json.loads((tmp_path / "tuned" / "evaluation" / "milestones.json").read_text())
    assert tuned["result"]["settings"]["model"]["family"] == "colours"
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    for words in (("evaluate", run), ("evaluate", export)):  # where its package is not installed
        code, _, errors = finished(command("training", *words, "--data", people))
        assert code == cli.FAILED and "'colours'" in errors and GROUP in errors
    for words in (("checkpoints", run), ("report", run)):
        code, output, errors = finished(command("training", *words))
        assert code == cli.COMPLETE, output + errors
