"""Whether a run may go on in its folder: with which settings it began, which may differ now, and on what data."""

from dataclasses import replace
from typing import TYPE_CHECKING

from datapipe.core.bounds.text_trees import parse_toml
from datapipe.core.errors import ConfigError, DataError
from training import checkpoint
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder

if TYPE_CHECKING:
    from datapipe.stream.training_data import Data

FREE_TO_CHANGE = ("out", "storage", "engine", "checkpoints", "cluster", "evaluation.data", "evaluation.every_epochs",
                  "evaluation.scoring.embed_batch", "optimisation.micro_batch", "backbone.checkpoint_blocks",
                  "backbone.compile_blocks", "stream.threads", "stream.prefetch", "stream.cache_mb", "stream.cache_gb",
                  "stream.cache_dir", "stream.reads", "stream.max_bad", "stream.assignment")  # fmt: skip
"""Settings that may differ when a run is continued: they change where, how fast and how often, not what is learnt.
(stream.manifest and stream.mix are compared by their content, not by their addresses.)"""


def saved_config(folder: RunFolder) -> RunConfig | None:
    """The resolved recipe of a run folder; None where there is none. One without a version of views is of an earlier
    version of this project, which had the first rule."""
    where = folder.store.address("config.toml")
    try:
        text = folder.read_text("config.toml")
        if text is None:
            return None
        tree = parse_toml(text)
    except ValueError as error:
        raise DataError(f"the recipe of the run is damaged: {error}", where=where, hint="copy it again") from error
    views = tree.get("views", {})
    return recipes.validate(tree | {"views": {"version": 1} | views if isinstance(views, dict) else views}, where=where)


def as_begun(config: RunConfig) -> RunConfig:
    """The recipe with what a run with checkpoints goes on with whatever the recipe says: the rule by which its views
    are cut."""
    folder = RunFolder(config.out, config.storage)
    if not checkpoint.complete(folder.at("checkpoints")) or (before := saved_config(folder)) is None:
        return config
    return replace(config, views=replace(config.views, version=before.views.version))


def refuse_changed_settings(config: RunConfig, folder: RunFolder) -> None:
    """Raises ConfigError where a run with checkpoints began with other settings that change what is learnt."""
    if not checkpoint.complete(folder.at("checkpoints")):
        return
    before = saved_config(folder)
    if before is None:
        return
    changed = recipes.differences(before, config, ignore=(*FREE_TO_CHANGE, "stream.manifest", "stream.mix"))
    if changed:
        raise ConfigError(
            "the run in this folder began with other settings:\n" + "\n".join(f"    {line}" for line in changed),
            where=folder.url,
            hint="set them back to go on with that run, or choose another folder with --out",
        )


def refuse_changed_data(folder: RunFolder, data: "Data") -> None:
    """Raises DataError where the newest checkpoint was made on other data."""
    store = folder.at("checkpoints")
    for name in reversed(checkpoint.complete(store)):
        try:
            marker = checkpoint.read_marker(store, name)
        except DataError:
            continue  # a damaged one is passed over, with a warning, when it is read
        where = store.address(name)
        checkpoint.refuse_other_data(marker, data.id, data.rows, data.replaces, where=where)
        return
