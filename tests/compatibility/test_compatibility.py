"""What an earlier version wrote goes on: a data set and a run that was stopped on its way (`make.py` says how made)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datapipe.__main__ import main as data
from datapipe.stream.preview import TrainingViews
from tests.compatibility.make import STEPS, STOP
from tests.end_to_end.tiny import audited, step_records
from tests.support.ranks import run_ranks
from training.__main__ import main
from training.config import recipe_toml as recipes
from training.config.continuation import as_begun
from training.config.run_config import RunConfig
from training.core.world import World
from training.preflight.checks import check
from training.trainer.pretrain import _plan

WRITTEN = Path(__file__).parent / "written"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A copy, as both go on in place."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


@pytest.mark.slow
def test_run__goes_on_with_the_losses_that_it_would_have_had(written: Path) -> None:
    run = written / "run"
    before = step_records(run)
    assert main(["pretrain", str(run / "config.toml"), "--out", str(run),
                 "--stream.manifest", str(written / "shards")]) == 0  # fmt: skip
    later = step_records(run, attempt=2)
    assert [record["step"] for record in (*before, *later)] == [*range(1, STEPS + 1)] and len(before) == STOP
    undisturbed = json.loads((written / "undisturbed.json").read_text())
    found = {str(record["step"]): record["loss"] for record in (*before, *later)}
    assert found == pytest.approx(undisturbed, rel=1e-4, abs=1e-6)  # another processor rounds otherwise
    assert sorted(audited(run)) == [*range(1, STEPS + 1)]
    assert json.loads((run / "views.json").read_text())["spec"]["version"] == 1
    sheets = [np.asarray(Image.open(folder / "first_batch.jpg")).astype(int) for folder in (run, WRITTEN / "run")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 4  # by the later rule for bands 17
    saved = recipes.load(run / "config.toml")
    assert saved.views.version == saved.stream.assignment_version == 1
    assert "cut and resized by version 1 of the rules" in (run / "log.txt").read_text()
    for words in (["checkpoints", str(run), "verify"], ["report", str(run)], ["export", str(run)]):
        assert main(words) == 0


def test_run__goes_on_with_the_views_that_it_began_with(written: Path) -> None:
    """Its crops have odd heights, at which bands of the body have other rows by the rule of later versions. A recipe
    that says nothing, and one that says otherwise; a run that has not yet saved begins anew, by the later rule."""
    run = written / "run"
    saved = recipes.load(run / "config.toml")
    config = replace(saved, out=str(run), stream=replace(saved.stream, manifest=str(written / "shards")))
    assert (config.views.version, config.stream.assignment_version) == (3, 2)
    plan = check(config, 1)
    assert (plan.config.views.version, plan.spec.version, plan.config.stream.assignment_version) == (1, 1, 1)
    assert as_begun(replace(config, views=replace(config.views, version=1))) == plan.config
    assert TrainingViews.from_json((run / "views.json").read_text(), where="views.json").spec == plan.spec
    shutil.rmtree(run / "checkpoints")
    anew = check(config, 1)
    assert (anew.spec.version, anew.config.stream.assignment_version) == (3, 2)


def test_run__all_ranks_go_on_with_the_rules_that_it_began_with(written: Path) -> None:
    """Only the leading rank looks into the run folder."""
    run = written / "run"
    saved = recipes.load(run / "config.toml")
    config = replace(saved, out=str(run), stream=replace(saved.stream, manifest=str(written / "shards")))
    assert run_ranks(2, _rules, config) == [(1, 1), (1, 1)]
    shutil.rmtree(run / "checkpoints")
    assert run_ranks(2, _rules, config) == [(3, 2), (3, 2)]


def _rules(world: World, config: RunConfig) -> tuple[int, int]:
    plan = _plan(config, world)
    return plan.config.views.version, plan.config.stream.assignment_version


def test_data_set__is_whole_and_can_be_changed(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, crops = str(written / "shards"), written / "crops.txt"
    crops.write_text("0001_c1s1_000002_00.jpg\n")
    for words in (["verify", shards], ["remove", shards, "--names", str(crops)], ["verify", shards]):
        assert data([*words, "--workers", "1"]) == 0, capsys.readouterr()
