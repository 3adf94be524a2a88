"""Each PersonMAE recipe runs: its own settings, a tiny backbone, generated crops, three real steps."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.end_to_end import tiny
from training import methods
from training.config.build import build_method
from training.config.recipe_toml import load
from training.core.host import LocalHost
from training.core.world import World
from training.methods.personmae import PersonMae, PersonMaeConfig
from training.trainer.pretrain import pretrain

FOLDER = Path(methods.__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("personmae_*.toml"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.generated(tmp_path_factory.mktemp("crops"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__runs_three_real_steps(path: Path, manifest: str, tmp_path: Path) -> None:
    config = tiny.shrunk(load(path), manifest, tmp_path / "run")
    ending = pretrain(config, world=World(), host=LocalHost())
    assert ending.complete and ending.step == 3
    records = tiny.step_records(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3]
    told = {"loss_pixel", "loss_feature", "feature_cosine", "feature_rank", "student_teacher_cosine"}
    assert told <= records[-1].keys()
    assert [record["momentum"] for record in records] == pytest.approx([0.999, 0.99903, 0.99906])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__is_of_the_published_size_and_says_every_choice(path: Path) -> None:
    config = load(path)
    assert isinstance(config.method, PersonMaeConfig)
    said = path.read_text()
    choices = {field.name for field in dataclasses.fields(config.method)} - {"weigh_centres"}  # of one region only
    assert all(f"\n{name} = " in said for name in choices)
    with torch.device("meta"):
        method = build_method(config)
    assert isinstance(method, PersonMae) and method.kept == 32
    assert config.optimisation.lr == pytest.approx(1.5e-4 * config.optimisation.batch / 256)
