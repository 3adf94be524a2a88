"""Whether a run may go on in its folder: with which settings it began, which may differ now, and on what data."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from datapipe.core.bounds.text_trees import parse_toml
from datapipe.core.errors import ConfigError, DataError
from datapipe.core.parallel import in_order
from datapipe.storage import is_remote
from training import checkpoint
from training.checkpoint import lineage
from training.checkpoint.metadata import parsed_marker
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder

if TYPE_CHECKING:
    from datapipe.stream.training_data import Data

FREE_TO_CHANGE = ("out", "storage", "engine", "checkpoints", "cluster", "evaluation.data", "evaluation.every_epochs",
                  "evaluation.scoring.embed_batch", "optimisation.micro_batch", "backbone.checkpoint_blocks",
                  "backbone.compile_blocks", "method.health_every", "stream.threads", "stream.processes",
                  "stream.prefetch", "stream.cache_mb", "stream.cache_gb", "stream.cache_dir", "stream.reads",
                  "stream.requests_per_s", "stream.max_bad",
                  "stream.assignment")  # fmt: skip
"""Settings that may differ when a run is continued: they change where, how fast and how often, not what is learnt.
(stream.manifest and stream.mix are compared by their content, not by their addresses.)"""


class BegunRules(NamedTuple):
    """Versions of the rules that a run goes on with whatever its recipe says."""

    views: Literal[1, 2, 3]
    assignment: Literal[1, 2]

    @staticmethod
    def of(config: RunConfig) -> "BegunRules":
        """The versions that a recipe sets."""
        return BegunRules(config.views.version, config.stream.assignment_version)

    def set_in(self, config: RunConfig) -> RunConfig:
        """The recipe with these."""
        return replace(config, views=replace(config.views, version=self.views),
                       stream=replace(config.stream, assignment_version=self.assignment))  # fmt: skip


FIRST_RULES = {"views": {"version": 1}, "stream": {"assignment_version": 1}}
"""Settings of runs of versions of this project that did not record them."""


class Before(NamedTuple):
    """What a run folder holds of the run so far."""

    folder: RunFolder
    names: list[str]
    """Of the run's checkpoints, oldest first."""
    newest: bytes
    """The newest one's marker; empty where it has to be read."""
    recipe: str | None
    """The resolved recipe as it is stored; None where there is none."""

    @property
    def config(self) -> RunConfig | None:
        """The resolved recipe; None without checkpoints or without a recipe. Raises ConfigError."""
        return None if not self.names or self.recipe is None else _parsed(self.recipe, self.folder)


def look(folder: RunFolder) -> Before:
    """Read it, from a remote store side by side: the time of two requests."""
    store = folder.at("checkpoints")
    asks: tuple[Callable[[], Any], ...] = (
        partial(lineage.look, store, ahead=True),
        partial(folder.read_text, "config.toml"),
    )
    surveyed, recipe = in_order(lambda ask: ask(), asks, threads=len(asks) if is_remote(store.url) else 0)
    lineage.tell(store, surveyed)
    newest = surveyed.markers.get(surveyed.names[-1], b"") if surveyed.names else b""
    return Before(folder, surveyed.names, newest, recipe)


def saved_config(folder: RunFolder) -> RunConfig | None:
    """The resolved recipe of a run folder; None where there is none. One without versions of rules is of an earlier
    version of this project, which had the first ones."""
    text = folder.read_text("config.toml")
    return None if text is None else _parsed(text, folder)


def _parsed(text: str, folder: RunFolder) -> RunConfig:
    where = folder.store.address("config.toml")
    try:
        tree = parse_toml(text)
    except ValueError as error:
        raise DataError(f"the recipe of the run is damaged: {error}", where=where, hint="copy it again") from error
    for section, first in FIRST_RULES.items():
        given = tree.get(section, {})
        tree[section] = first | given if isinstance(given, dict) else given
    return recipes.validate(tree, where=where)


def ran_on(folder: RunFolder) -> str:
    """ "cuda" or "cpu": what the run in this folder was on last; empty where there is none that says so."""
    return str(folder.read_record("environment.json").get("device_type", ""))


def as_begun(config: RunConfig, before: Before | None = None) -> RunConfig:
    """The recipe with what a run with checkpoints goes on with whatever the recipe says: the rules that it began with.
    `before`: what its folder holds, where that is known."""
    began = (before or look(RunFolder(config.out, config.storage))).config
    return config if began is None else BegunRules.of(began).set_in(config)


def refuse_changed_settings(config: RunConfig, before: Before) -> None:
    """Raises ConfigError where a run with checkpoints began with other settings that change what is learnt."""
    began = before.config
    if began is None:
        return
    changed = recipes.differences(began, config, ignore=(*FREE_TO_CHANGE, "stream.manifest", "stream.mix"))
    if changed:
        raise ConfigError(
            "the run in this folder began with other settings:\n" + "\n".join(f"    {line}" for line in changed),
            where=before.folder.url,
            hint="set them back to go on with that run, or choose another folder with --out",
        )


def refuse_changed_data(before: Before, data: "Data") -> None:
    """Raises DataError where the newest checkpoint was made on other data."""
    store = before.folder.at("checkpoints")
    for name in reversed(before.names):
        try:
            newest = before.newest if name == before.names[-1] else b""
            marker = parsed_marker(newest, store, name) if newest else checkpoint.read_marker(store, name)
        except DataError:
            continue  # a damaged one is passed over, with a warning, when it is read
        where = store.address(name)
        checkpoint.refuse_other_data(marker, data.id, data.rows, data.replaces, where=where)
        return
