"""Who keeps the others waiting: from numbers, and on real ranks one of which is slow."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.methods.pass_reid import Pass
from training.trainer.monitoring import stragglers as pace
from training.trainer.monitoring.observer import StepDone
from training.trainer.monitoring.stragglers import SLOWER, WINDOW_STEPS, RankTimes, StragglerMonitor, stragglers
from training.trainer.pretrain import pretrain

STEPS = 3 * WINDOW_STEPS + 3
FORWARD_S, SLOW_S = 0.1, 0.2
"""By the clock of this test: how long a forward pass takes, and how much longer a slow one."""


def _shares(*own: float, step: float = 1.0) -> list[RankTimes]:
    return [RankTimes(forward, 0.0, step) for forward in own]


@pytest.mark.parametrize(("shares", "slow"), [
    (_shares(0.5, 0.5, 0.5), set()),
    (_shares(0.5, 0.5 * SLOWER + 0.06, 0.5), {1}),
    (_shares(0.01, 0.03, 0.01), set()),  # three times as slow, and nobody cares
    (_shares(0.4, 0.9), {1}),
    (_shares(0.9), set()),
    ([RankTimes(0.3, 0.0, 1.0), RankTimes(0.3, 0.4, 1.0)], {1}),  # waits for data, and the others for it
    ([RankTimes(0.3, 0.4, 1.0), RankTimes(0.3, 0.4, 1.0)], set()),
])  # fmt: skip
def test_stragglers__by_their_own_time(shares: list[RankTimes], slow: set[int]) -> None:
    assert stragglers(shares) == slow


class NamedHost(LocalHost):
    """A host that keeps what it hears."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.said = rank, []  # type: ignore[var-annotated]
        self.steps: list[tuple[int, str]] = []

    def place(self) -> str:
        return f"machine-{self.rank}"

    def show_line(self, line: str) -> None:
        self.said.append(line)

    def alive(self, step: int, doing: Any) -> None:
        self.steps.append((step, doing))


def _without_waiting(step: StepDone) -> StepDone:
    return step._replace(batch=replace(step.batch, waited_s=0.0))


def _one_slow(world: World, path: str) -> tuple[list[str], list[tuple[int, str]]]:
    """Rank 1's forward pass takes longer until the middle of the run. Nothing else takes any time by the clock of this
    process, however busy the machine is."""
    host, now = NamedHost(world.rank), [0.0]
    forward, note = Pass.forward, StragglerMonitor.step

    def slow(self: Pass, *arguments: Any) -> Any:
        step = host.steps[-1][0]
        now[0] += FORWARD_S + (SLOW_S if world.rank == 1 and step < 2 * WINDOW_STEPS else 0)
        return forward(self, *arguments)

    pace.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore[attr-defined]
    StragglerMonitor.step = lambda self, step: note(self, _without_waiting(step))  # type: ignore[method-assign]
    Pass.forward = slow  # type: ignore[method-assign]
    pretrain(recipes.load(path), world=world, host=host)
    return host.said, host.steps


@pytest.mark.slow
def test_pace__a_slow_rank_is_named_with_its_machine_though_all_steps_take_as_long(tmp_path: Path) -> None:
    path = recipe(tmp_path, generated(tmp_path), str(tmp_path / "run"), epochs=STEPS * 6 / 18)
    (said, steps), _ = run_ranks(2, _one_slow, str(path))
    named = [line for line in said if line.startswith("straggler")]
    assert len(named) == 1 and "rank 1 on machine-1 needs" in named[0]
    assert "rank 1 on machine-1 keeps up again" in said
    assert all(line in (tmp_path / "run" / "log.txt").read_text() for line in named)
    windows = [json.loads(line) for line in (tmp_path / "run" / "ranks" / "pace.jsonl").read_text().splitlines()]
    assert [window["step"] for window in windows] == [WINDOW_STEPS, 2 * WINDOW_STEPS, 3 * WINDOW_STEPS]
    slow, fast = windows[0]["own_s"][1], windows[0]["own_s"][0]
    assert (slow, fast) == pytest.approx((FORWARD_S + SLOW_S, FORWARD_S)) and windows[0]["wait_share"] == [0, 0]
    kept = (tmp_path / "run" / "ranks" / "rank_01.log").read_text()
    assert "rank 1 of 2" in kept and "machine-1" in kept and f"step {WINDOW_STEPS}: " in kept and "ended" in kept
    assert [doing for _, doing in steps[:5]] == ["forward", "backward", "forward", "backward", "data"]
    assert steps[-1] == (STEPS, "data")
