"""The recipes that come along, line by line beside what was published."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from training.config.recipe_toml import leaves as flattened
from training.config.recipe_toml import load
from training.methods import known
from training.preflight.deviations import IGNORED, comments, compare, leaves, nearest
from training.recipes import SHIPPED

PUBLISHED = {name: recipe for kind in known().values() for name, recipe in kind.published.items()}
RECIPES = sorted(PUBLISHED)
DEEPER = {"backbone.drop_path": (0.3, 0.1)}
LOWERED = {"optimisation.precision": ("bf16", "fp16")}
DEVIATIONS: dict[str, dict[str, tuple[object, object]]] = {
    name: {} if name.startswith(("usl_", "uda_"))
    else LOWERED | (DEEPER if name in ("dino_vitl", "pass_vitl") else {})
    for name in RECIPES
}  # fmt: skip
"""All that may differ: our value, the published one."""


def test_published__every_recipe_of_a_method() -> None:
    shipped = {path.stem.removesuffix("_4096") for path in SHIPPED.glob("*.toml")}
    assert shipped - {"demo", "demo_usl"} == set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe__differs_from_the_publication_only_where_declared(name: str) -> None:
    found = compare(load(name))
    assert found.recipe == name and found.data == PUBLISHED[name].data
    assert {one.key: (one.ours, one.published) for one in found.differences} == DEVIATIONS[name]
    assert all(one.source for one in found.differences)


@pytest.mark.parametrize("name", RECIPES)
def test_published__keys_are_keys_of_the_recipe(name: str) -> None:
    config = load(name)
    assert PUBLISHED[name].settings.keys() <= leaves(config).keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe__every_choice_has_its_reason(name: str) -> None:
    """What the file sets that changes the result, and no table gives a value for."""
    path = SHIPPED / f"{name}.toml"
    written = {key for key, _ in flattened((), tomllib.loads(path.read_text())) if not key.startswith(IGNORED)}
    choices = compare(load(name)).choices
    assert {one.key for one in choices} == written - PUBLISHED[name].settings.keys()
    assert all(one.reason and one.ours == one.shipped for one in choices)


def test_compare__a_changed_setting_beside_its_source() -> None:
    config = load("pass_vitb", ["--optimisation.batch", "256", "--backbone.drop-path", "0"])
    found = {one.key: one for one in compare(config).differences}
    assert found.keys() == {"optimisation.batch", "backbone.drop_path", "optimisation.precision"}
    assert found["optimisation.batch"].published == 512 and found["optimisation.batch"].source == "PASS scripts"


def test_compare__free_keys_are_left_out() -> None:
    before = load("pass_vits")
    after = load("pass_vits", ["--out", "elsewhere", "--engine.zero-stage", "3", "--cluster.max-workers", "2",
                               "--checkpoints.every-steps", "5", "--optimisation.micro-batch", "8"])  # fmt: skip
    assert compare(after) == compare(before)


def test_compare__a_choice_changed_again_shows_both() -> None:
    (own,) = [one for one in compare(load("personmae_vitb", ["--method.mask-ratio", "0.5"])).choices
              if one.key == "method.mask_ratio"]  # fmt: skip
    assert (own.ours, own.shipped) == (0.5, 0.75) and "BootMAE" in own.reason


def test_nearest__another_architecture_is_compared_with_the_smallest() -> None:
    config = load("dino_vitl")
    assert nearest(config) == "dino_vitl"
    assert nearest(replace(config, backbone=replace(config.backbone, arch="vit_tiny"))) == "dino_vits"


@pytest.mark.parametrize(("flags", "expected"), [
    ((), "supervised"), (("--backbone.size", "384", "128"), "supervised_384"),
    (("--method.parts", "3"), "supervised_pass"), (("--optimisation.optimizer", "adamw"), "supervised_mae"),
])  # fmt: skip
def test_nearest__fine_tuning_by_weights_and_size(flags: tuple[str, ...], expected: str) -> None:
    assert nearest(load("supervised", flags)) == expected


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("usl_", "uda_"))])
def test_nearest__unsupervised_by_weights_and_data_set(name: str) -> None:
    assert nearest(load(name)) == name


def test_comments__behind_a_value_or_on_the_line_above(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "# about the file\n\nout = 'x'\n[a]\nb = 1   # why one\nc = 2\n# why three\nd = [1, 2]\n"
        "[a.e]  # no key\nf = '#1'  # a '#' is no comment\n"
    )
    assert comments(recipe) == {"a.b": "why one", "a.d": "why three", "a.e.f": "a '#' is no comment"}
