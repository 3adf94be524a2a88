"""Each PersonMAE recipe runs: its own settings, a tiny backbone, generated crops, three real steps."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.datapipe.crop_set import jpegs
from tests.flow import tiny
from training import methods
from training.config import RunConfig, load
from training.engine.host import LocalHost
from training.engine.world import World
from training.methods.personmae import PersonMae, PersonMaeConfig
from training.pretrain import build_method, pretrain

FOLDER = Path(methods.__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("personmae_*.toml"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("crops")
    (folder / "in").mkdir()
    for row, data in enumerate(jpegs(18)):
        (folder / "in" / f"{row:04d}_c1s1_{row:06d}_00.jpg").write_bytes(data)
    tiny.shards(folder / "in", str(folder / "set"))
    return str(folder / "set")


def shrunk(config: RunConfig, manifest: str, out: Path) -> RunConfig:
    """The recipe with another data set, place, backbone and length; three steps of six images."""
    backbone = dataclasses.replace(config.backbone, arch="custom", size=(64, 32), width=24, depth=2, heads=3, patch=8)
    optimisation = dataclasses.replace(config.optimisation, batch=6, micro_batch=3, epochs=3.0, warmup_epochs=1.0)
    engine = dataclasses.replace(config.engine, stepper="plain", threads=1, device="cpu")
    stream = dataclasses.replace(config.stream, manifest=manifest, threads=1, block=4, window=3)
    return dataclasses.replace(
        config, out=str(out), backbone=backbone, optimisation=optimisation, engine=engine, stream=stream,
        samples_per_epoch=6,
    )  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__runs_three_real_steps(path: Path, manifest: str, tmp_path: Path) -> None:
    config = shrunk(load(path), manifest, tmp_path / "run")
    ending = pretrain(config, world=World(), host=LocalHost())
    assert ending.complete and ending.step == 3
    lines = (tmp_path / "run" / "metrics" / "attempt_001.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss_pixel" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"loss_pixel", "loss_feature", "cosine", "rank"} <= records[-1].keys()
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
