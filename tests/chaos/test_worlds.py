"""Ranks are killed and the run goes on with fewer: in float64 the weights are those of one undisturbed process."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.trainer.pretrain
from tests.chaos.judge import wrong_samples
from tests.end_to_end.tiny import final_state, recipe, shards
from tests.support.ranks import exit_codes, run_ranks
from training.config import recipe_toml as recipes
from training.config.build import initial_method
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.world import World
from training.methods.base import Method
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.pretrain import pretrain

CROPS, STEPS = 48, 24
DEATHS = ((3, 2, 8), (2, 0, 13))
"""(world, rank that dies, after how many of its steps): before a save is due and while one is; the rest alone."""


class Mortal(LocalHost):
    """Its process is killed when it has made so many steps. 0: never."""

    def __init__(self, dies_after: int) -> None:
        super().__init__()
        self._left = dies_after

    def preempted(self) -> bool:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def _double(config: RunConfig) -> tuple[Method, dict[str, Any]]:
    method, origin = initial_method(config)
    return method.double(), origin


def _train(world: World, path: str, out: str, mortal: int, steps: int) -> None:
    """A rank with the plain stepper, all in float64."""
    training.trainer.pretrain.initial_method = _double  # in this process of the test only
    training.trainer.pretrain.BatchToDevice = lambda device, statistics: BatchToDevice(
        device, statistics, dtype=torch.float64
    )  # type: ignore
    pretrain(recipes.load(path, ["--out", out]), world=world, host=Mortal(steps if world.rank == mortal else 0))


@pytest.mark.slow
def test_worlds__float64_weights_are_those_of_one_process(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "crops", CROPS)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = str(recipe(tmp_path, data.url, "unused", epochs=STEPS * 6 / CROPS))
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for world, mortal, steps in DEATHS:
        assert exit_codes(world, _train, path, str(run), mortal, steps)[mortal] == -signal.SIGKILL
    run_ranks(1, _train, path, str(run), 0, 0)
    run_ranks(1, _train, path, str(undisturbed), 0, 0)
    assert wrong_samples(run, CROPS, STEPS) == {}
    before, after = final_state(undisturbed), final_state(run)
    assert before.keys() == after.keys() and before["model/student.backbone.cls_token"].dtype == torch.float64
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9, msg=name)
