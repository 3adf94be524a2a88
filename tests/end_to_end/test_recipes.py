"""Each recipe of the DINO family runs in one process: its own settings, a tiny backbone, generated crops, three real
steps."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from tests.end_to_end import tiny
from training import methods
from training.config.batch_split import split_of
from training.config.recipe_toml import differences, load
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.world import World
from training.methods.dino import DinoConfig
from training.methods.pass_reid import PassConfig
from training.methods.personvit import PersonVitConfig
from training.preflight.calculated import memory
from training.preflight.checks import refuse_split
from training.preflight.deviations import comments, compare
from training.trainer.pretrain import pretrain

FOLDER = Path(methods.__file__).parents[1] / "recipes"
FAMILY = {"dino": DinoConfig, "pass": PassConfig, "personvit": PersonVitConfig}
SIZES = {"vits": "vit_small", "vitb": "vit_base", "vitl": "vit_large"}
DEMO = FOLDER / "demo.toml"
RECIPES = sorted(path for name in FAMILY for path in FOLDER.glob(f"{name}_*.toml") if "_4096" not in path.stem)
LARGE = sorted(FOLDER.glob("*_4096.toml"))
"""For 64 to 512 GPUs: others with another batch."""
METRICS = {"dino": set(), "pass": {"loss_part"}, "personvit": {"loss_patch", "hidden"}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.generated(tmp_path_factory.mktemp("crops"))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(set(FOLDER.glob("*.toml")) - {DEMO}), ids=lambda path: path.stem)
def test_recipes__of_publications_resize_as_these_do(path: Path) -> None:
    """Antialiased bicubic; what names no publication gets the fast way."""
    assert load(path).views.interpolation == "bicubic"
    assert load(DEMO).views.interpolation == "linear"
    assert ViewConfig().interpolation == "linear"


def shrunk(config: RunConfig, manifest: str, out: Path) -> RunConfig:
    """Its head too; micro-batches as the recipe has them."""
    given = config.optimisation.micro_batch
    config = tiny.shrunk(config, manifest, out)
    head = replace(config.method.head, out_dim=32, hidden=16, bottleneck=8)
    method = replace(config.method, head=head, local_size=(32, 16))
    optimisation = replace(config.optimisation, micro_batch=given)
    return replace(config, method=method, optimisation=optimisation)


def test_recipes__one_per_method_and_size() -> None:
    assert {path.stem for path in RECIPES} == {f"{name}_{size}" for name in FAMILY for size in SIZES}


@pytest.mark.parametrize("path", [*RECIPES, DEMO], ids=lambda path: path.stem)
def test_recipe__runs_three_real_steps(path: Path, manifest: str, tmp_path: Path) -> None:
    config = shrunk(load(path), manifest, tmp_path / "run")
    ending = pretrain(config, world=World(), host=LocalHost())
    assert ending.complete and ending.step == 3
    records = tiny.step_records(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3]
    wanted = {
        "loss",
        "loss_cls",
        "target_entropy",
        "target_information",
        "feature_cosine",
        "feature_rank",
        "student_teacher_cosine",
    }
    assert wanted | METRICS[config.method.name] <= records[0].keys()  # targets are looked at now and then


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_recipe__starts_with_any_number_of_workers(path: Path) -> None:
    config = load(path)
    couples = config.method.name == "supervised" or memory.census(config).couples
    most = config.cluster.max_workers or 17
    for workers in (*range(1, most + 1), 24, 56, 64, 504, 512):
        split = split_of(config, workers)
        refuse_split(config, split, couples=couples)
        assert split.per_rank * workers >= config.optimisation.batch
        assert not couples or split.per_rank == split.micro_batch


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__is_of_the_published_size_and_rate(path: Path) -> None:
    config, said = load(path), path.read_text()
    name, _, size = path.stem.partition("_")
    assert isinstance(config.method, FAMILY[name]) and config.backbone.arch == SIZES[size]
    assert config.out == f"runs/{path.stem}" and f"recipes/{path.name}" in said
    assert config.optimisation.lr == pytest.approx(5e-4 * config.optimisation.batch / 256)
    gpus = re.search(r"# Hardware: +(\d+) GPUs of (\d+) GB", said)
    assert gpus is not None and f"{config.optimisation.batch / int(gpus[1]):g} images each" in said
    assert config.cluster.max_workers == 0 and config.cluster.least_workers <= int(gpus[1])
    for heading in ("# Hardware:", "# Length:", "# Expected:"):
        assert heading in said


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_recipe__is_another_one_but_for_what_it_declares(path: Path) -> None:
    """By the published rule, with a least number of workers, each departure behind its value and in the header."""
    config, before = load(path), load(FOLDER / f"{path.stem.removesuffix('_4096')}.toml")
    changed = {line.partition(":")[0] for line in differences(before, config)}
    assert changed == {"out", "optimisation.batch", "optimisation.lr", "checkpoints.keep_every_steps",
                       "cluster.min_workers"}  # fmt: skip
    assert config.optimisation.batch == 4096 and config.optimisation.lr == pytest.approx(5e-4 * 4096 / 256)
    assert config.cluster.max_workers == 0 and 1 < config.cluster.min_workers < 64
    said = comments(path)
    assert all(said[key].startswith("ours: ") for key in ("optimisation.batch", "optimisation.lr"))
    found = compare(config)
    departures = {one.key for one in (*found.differences, *found.choices)}
    assert {"optimisation.batch", "optimisation.lr"} <= departures
    text = path.read_text()
    assert f"recipes/{path.name}" in text and "# Hardware:  64 to 512 GPUs" in text and "but for what is ours" in text


def test_recipe__accumulation_is_refused_with_a_stem_of_batch_norm(manifest: str, tmp_path: Path) -> None:
    config = tiny.shrunk(load(FOLDER / "dino_vitb.toml"), manifest, tmp_path / "run")
    config = replace(config, method=replace(config.method, local_size=(32, 16)))
    assert config.optimisation.micro_batch == 3
    with pytest.raises(ConfigError, match="batch norm in the stem"):
        pretrain(config, world=World(), host=LocalHost())
