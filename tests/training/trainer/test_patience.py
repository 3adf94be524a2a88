"""What one rank does alone while the others wait may take longer than a collective; and every group has its timeout."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.collectives import all_reduce
from training.core.host import Doing, LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World, process_groups
from training.evaluation import evaluation
from training.trainer import milestones
from training.trainer.milestones import Milestones
from training.trainer.pretrain import pretrain

TIMEOUT_S, SLOW_S = 1.0, 2.5


class Alive(LocalHost):
    def __init__(self) -> None:
        super().__init__()
        self.signs = 0

    def alive(self, step: int, doing: Doing) -> None:
        self.signs += 1


def _slow_scoring(world: World, folder: str) -> tuple[int, int]:
    """(signs of life while the leading rank scores, sum over the ranks after that)."""
    config = recipes.validate({"out": folder, "evaluation": {"data": folder}}, where="test")
    host, scored = Alive(), RunFolder(folder, config.storage)
    scores = {"set": "people", "headline": "cls", "features": {"cls": {"mAP": 0.5, "rank1": 0.5}}, "weights": "",
              "step": 3}  # fmt: skip

    def slow(*_: Any, **__: Any) -> dict[str, Any]:
        time.sleep(SLOW_S)
        return scores

    evaluation.score, milestones.summary = slow, lambda *_: {"last": scores, "best": scores}
    clock: Any = type("Clock", (), {"batch": 6, "end": 18})
    world.expect_within(TIMEOUT_S)
    Milestones(config, clock, scored, world, host).score(18)
    return host.signs, int(all_reduce(torch.ones(1)))


@pytest.mark.slow
def test_milestones__may_score_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    for signs, ranks in run_ranks(2, _slow_scoring, str(tmp_path / "run")):
        assert signs >= 1 and ranks == 2


def _late(world: World, seconds: float) -> list[float]:
    world.expect_within(TIMEOUT_S)
    times = []
    for late in range(world.size):
        time.sleep(seconds if world.rank == late else 0)
        world.meet()
        times.append(time.monotonic())
    return times


@pytest.mark.slow
def test_meet__waits_for_whoever_is_last() -> None:
    """One machine, one clock: nobody leaves before the last has come."""
    first, second = zip(*run_ranks(2, _late, 2 * TIMEOUT_S), strict=True)
    assert min(second) - min(first) >= TIMEOUT_S


def _timeouts(world: World, path: str, stage: int) -> list[tuple[float, float]]:
    """(when training began, after its first step) of every process group."""
    seen: list[list[float]] = []

    class Looks(LocalHost):
        def alive(self, step: int, doing: Doing) -> None:
            if len(seen) < 2 and (step, doing) in ((0, "forward"), (1, "forward")) and len(seen) == step:
                seen.append([_timeout_s(group) for group in process_groups()])

    dist.new_group(ranks=[0, 1])  # one that is not DeepSpeed's, either
    config = recipes.override(recipes.load(path), ["--engine.stepper", "deepspeed", "--engine.zero-stage", str(stage),
                                                   "--cluster.collective-timeout-s", "77",
                                                   "--cluster.start-timeout-s", "200"])  # fmt: skip
    pretrain(config, world=world, host=Looks())
    return list(zip(*seen, strict=True))


def _timeout_s(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_timeouts__of_all_groups_are_the_recipes(tmp_path: Path, stage: int) -> None:
    path = recipe(tmp_path, generated(tmp_path, 12), str(tmp_path / "run"))
    for found in run_ranks(2, _timeouts, str(path), stage):
        assert len(found) >= 3  # torch's, ours and at least one of DeepSpeed's own
        assert set(found) == {(277.0, 77.0)}
