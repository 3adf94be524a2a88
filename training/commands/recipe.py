"""A recipe on the command line: `RECIPE [--dotted.flag value ...]` beside a command's own flags."""

from dataclasses import replace
from typing import Protocol, TypeVar

from datapipe.core import cli
from datapipe.core.errors import ConfigError
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.recipes import SHIPPED

COMMON = (
    "--out", "--stream.manifest", "--init.weights", "--backbone.arch", "--optimisation.epochs", "--optimisation.batch",
    "--optimisation.micro-batch", "--optimisation.lr", "--optimisation.precision", "--engine.device",
    "--engine.zero-stage", "--checkpoints.every-steps", "--evaluation.data", "--cluster.max-workers",
)  # fmt: skip
"""Flags of a recipe that most people give."""


class WithRecipe(Protocol):
    """What a command with a recipe is told."""

    @property
    def recipe(self) -> str: ...


C = TypeVar("C", bound=WithRecipe)


def read_with_recipe(kind: type[C], words: list[str], page: cli.Page) -> tuple[C, RunConfig]:
    """The command's own settings, and the resolved recipe. Help, and usage where no word is given, end the process.

    Raises:
        UsageError: a flag is wrong.
        ConfigError: there is no such recipe, or its file is wrong.
    """
    own = cli.flags_of(kind)
    shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
    page = replace(page, more=(*page.more, f"recipes: {shipped}"), common=(*(flag.name for flag in own), *COMMON))
    if not words or cli.wants_help(words):
        cli.show_help([*own, *cli.flags_of(RunConfig, _of_help(words))], words, page)
    chosen, rest = cli.read_some(kind, words, prog=page.prog)
    return chosen, recipes.load(chosen.recipe, rest, prog=page.prog, also=own)


def _of_help(words: list[str]) -> RunConfig:
    """The recipe whose values are shown as defaults."""
    try:
        return recipes.load(words[0]) if words and not words[0].startswith("-") else RunConfig()
    except ConfigError:
        return RunConfig()
