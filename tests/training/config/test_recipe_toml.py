import tomllib
from pathlib import Path

import pytest

from datapipe.core.errors import ConfigError, UsageError
from training.__main__ import main
from training.config import recipe_toml as recipes
from training.config.recipe_toml import load, override, to_toml, validate
from training.config.run_config import RunConfig
from training.methods import known
from training.recipes import SHIPPED


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_load__all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = '[optimisation]\nlr = "fast"\nbatch = 0\n[strem]\nblock = 1\n[backbone]\npatchs = 8\n'
    with pytest.raises(ConfigError) as caught:
        load(_write(tmp_path, text))
    said = str(caught.value)
    assert "4 mistakes" in said and "recipe.toml" in said
    assert "`optimisation.lr`" in said and "`optimisation.batch`" in said
    assert "unknown key `strem`; did you mean `stream`?" in said
    assert "unknown key `backbone.patchs`; did you mean `patch`?" in said


def test_load__a_misspelt_key_of_the_method_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `method.locals_per_parts`; did you mean `locals_per_part`"):
        load(_write(tmp_path, '[method]\nname = "pass"\nlocals_per_parts = 2\n'))


@pytest.mark.parametrize(("method", "told"), [
    ('name = "dino"\nlocal = 3', "unknown key `method.local`; did you mean `locals`?"),
    ('name = "personvit"\nhead.outdim = 3', "unknown key `method.head.outdim`; did you mean `out_dim`?"),
    ('name = "personvit"\nmask.ratio = [0.3]', "unknown key `method.mask.ratio`; did you mean `ratios`?"),
    ('name = "personvit"\nparts = 3', "unknown key `method.parts`"),
    ('name = "dinno"', "`method.name` must be one of cluster_contrast, dino, pass, personmae, personvit, supervised"),
    ("locals = 3", "`method.name` must be one of cluster_contrast, dino, pass, personmae, personvit, supervised"),
    ('name = "dino"\nteacher_temp = 0', "`method.teacher_temp` = 0: "),
    ('name = "personvit"\nmask.ratios = [0.3]', "`method.mask` = {'ratios': [0.3]}: "),
])  # fmt: skip
def test_load__mistakes_of_a_method_are_told_in_its_own_terms(tmp_path: Path, method: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_write(tmp_path, f"[method]\n{method}\n"))
    assert told in str(caught.value)


@pytest.mark.parametrize("name", list(known()))
def test_load__every_method_has_defaults_flags_and_a_round_trip(tmp_path: Path, name: str) -> None:
    recipe = _write(tmp_path, f'[method]\nname = "{name}"\n')
    config = load(recipe)
    assert config.method.name == name and recipes.to_tree(config)["method"]["name"] == name
    assert validate(tomllib.loads(to_toml(config)), where="") == config
    leaves = dict(recipes.leaves((), recipes.to_tree(config)))
    flag = next(key for key, value in leaves.items() if key.startswith("method.") and isinstance(value, float))
    assert recipes.differences(config, load(recipe, [f"--{flag}", "0.125"])) == [f"{flag}: {leaves[flag]} -> 0.125"]


def test_override__a_flag_of_another_method_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no flag `--method.parts`"):
        load(_write(tmp_path, '[method]\nname = "dino"\n'), ["--method.parts", "3"])


def test_load__a_recipe_that_comes_along_by_its_name() -> None:
    assert load("pass_vits") == load(SHIPPED / "pass_vits.toml")


def test_load__missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load(_write(tmp_path, "lr = = 3"))


def test_override__dotted_flags(tmp_path: Path) -> None:
    path = _write(tmp_path, "[optimisation]\nlr = 1e-3\n")
    found = load(path, ["--optimisation.lr", "2e-3", "--views.jitter.hue", "0.2", "--engine.audit", "True"])
    assert (found.optimisation.lr, found.views.jitter.hue, found.engine.audit) == (2e-3, 0.2, True)


def test_override__a_misspelt_flag_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no flag `--optimisation.lrr`; did you mean `--optimisation.lr`"):
        override(RunConfig(), ["--optimisation.lrr", "1"])


def test_help__documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--help-all"])
    assert caught.value.code == 0
    said = "".join(capsys.readouterr())
    for key, _ in recipes.leaves((), recipes.to_tree(RunConfig())):
        assert f"--{key.replace('_', '-')}" in said, key


def test_toml__reads_back_equal() -> None:
    config = override(RunConfig(), ["--out", 'a "quoted" \\ folder', "--optimisation.lr", "1.1e-05"])
    assert validate(tomllib.loads(to_toml(config)), where="") == config


def test_differences__names_what_changed() -> None:
    changed = override(RunConfig(), ["--optimisation.lr", "0.5", "--engine.threads", "3"])
    found = recipes.differences(RunConfig(), changed, ignore=("engine",))
    assert found == ["optimisation.lr: 0.001 -> 0.5"]


RECIPES = sorted(SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__load(path: Path) -> None:
    assert load(path).optimisation.batch > 0


def test_cluster__a_secret_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY looks like a secret") as caught:
        load(_write(tmp_path, '[cluster]\nenvironment = ["NCCL_DEBUG=INFO", "AWS_SECRET_ACCESS_KEY=xyzzy"]\n'))
    assert "xyzzy" not in str(caught.value)


def test_cluster__fewest_workers(tmp_path: Path) -> None:
    said = load(_write(tmp_path, "[cluster]\nmax_workers = 4\nmin_workers = 2\n")).cluster
    silent = load(_write(tmp_path, "[cluster]\nmax_workers = 4\n")).cluster
    assert (said.least_workers, silent.least_workers) == (2, 1)
    assert load(_write(tmp_path, "[cluster]\nmin_workers = 64\n")).cluster.max_workers == 0, "as the cluster has"
    with pytest.raises(ConfigError, match="min_workers 5 is more than max_workers 4"):
        load(_write(tmp_path, "[cluster]\nmax_workers = 4\nmin_workers = 5\n"))
