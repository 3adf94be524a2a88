"""What one rank refuses at a start all ranks raise: none waits for the others in vain, nor looks for itself."""

from pathlib import Path

import pytest

from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.trainer.pretrain import Ending, pretrain


def _run(world: World, path: str, seed: str) -> Ending | str:
    try:
        return pretrain(recipes.load(path, ["--seed", seed]), world=world, host=LocalHost())
    except ConfigError as error:
        return error.what


@pytest.mark.slow
def test_start__what_the_leading_rank_refuses_all_raise(tmp_path: Path) -> None:
    path = str(recipe(tmp_path, generated(tmp_path, 12), str(tmp_path / "run"), epochs=1))
    assert run_ranks(1, _run, path, "3") == [Ending(2, True)]
    refused = run_ranks(2, _run, path, "4")
    assert refused[0] == refused[1] and "seed" in str(refused[0]) and "other settings" in str(refused[0])
