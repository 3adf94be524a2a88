"""A NaN on one rank, once or again: no rank hangs, nothing is lost that need not be."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import training.trainer.pretrain
from datapipe.core.errors import DataError
from datapipe.stream.batch import Batch
from tests.end_to_end.tiny import final_state, recipe, shards
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.methods.base import Views
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.pretrain import pretrain


class PoisonedPlace(BatchToDevice):
    """Turns a view of chosen steps into NaN, on one rank: `poison` maps a step to how often it happens."""

    poison: dict[int, int] = {}
    rank_here = 0

    def __call__(self, batch: Batch) -> Views:
        views = super().__call__(batch)
        step = batch.start // 6 + 1
        if batch.sample[0] >= 0 and self.rank_here == 0 and self.poison.get(step, 0) > 0:
            self.poison[step] -= 1
            views["global"][0, 0] = float("nan")
        return views


def _run(world: World, path: str, out: str, stepper: str, poison: dict[int, int]) -> str:
    training.trainer.pretrain.BatchToDevice = PoisonedPlace  # type: ignore[misc]  # in this process of the test only
    training.trainer.pretrain.rehearse = lambda run, batch: None
    PoisonedPlace.poison, PoisonedPlace.rank_here = dict(poison), world.rank
    try:
        pretrain(recipes.load(path, ["--out", out, "--engine.stepper", stepper]), world=world, host=LocalHost())
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> str:
    folder = tmp_path_factory.mktemp("faults")
    write_crops(folder / "crops", 50)
    data = shards(folder / "crops", str(folder / "shards"))
    return str(recipe(folder, data.url, "unused", epochs=1.5))


def _actions(run: Path) -> list[tuple[int, str]]:
    log = run / "faults" / "steps.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(record["step"], record["action"]) for record in map(json.loads, lines)]


SCENARIOS = {"undisturbed": {}, "once": {2: 1, 8: 1}, "again": {8: 2}, "often": dict.fromkeys((4, 5, 6, 7), 99)}
"""Name -> step -> times that its views hold a NaN."""


def _all(world: World, path: str, folder: str, stepper: str) -> dict[str, str]:
    return {name: _run(world, path, f"{folder}/{name}", stepper, poison) for name, poison in SCENARIOS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stepper"), [(1, "plain"), (2, "deepspeed")])
def test_faults__rewind_skip_and_give_up(path: str, tmp_path: Path, world: int, stepper: str) -> None:
    said = run_ranks(world, _all, path, str(tmp_path), stepper)
    for rank in said:
        often = rank.pop("often")
        assert "4 of the last 1,000 steps had to be skipped" in often
        assert set(rank.values()) == {""}
    actions = {name: _actions(tmp_path / name) for name in SCENARIOS}
    # before the first checkpoint and after it: the weights are those of the undisturbed run
    assert actions["once"] == [(2, "rewound"), (8, "rewound")]
    before, after = final_state(tmp_path / "undisturbed"), final_state(tmp_path / "once")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    kept = np.load(tmp_path / "once" / "faults" / "step_0000008_rank_00.npz")
    assert kept["sample"].shape == (6 // world,) and kept["views/global"].dtype == np.uint8
    # again: skipped with a record, and the run goes on to its end
    assert actions["again"] == [(8, "rewound"), (8, "skipped")]
    assert all(bool(torch.isfinite(value).all()) for value in final_state(tmp_path / "again").values())
    assert actions["often"].count((7, "skipped")) == 1
