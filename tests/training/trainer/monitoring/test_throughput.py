"""Rates of the last steps, of all ranks; and what would have to be faster."""

import math

import pytest

from datapipe.core.progress import duration
from datapipe.stream.batch import LoaderCounters
from tests.support.ranks import run_ranks
from training.core.exchange import Exchange
from training.core.world import World
from training.trainer.monitoring import throughput
from training.trainer.monitoring.throughput import (
    NOBODY,
    RankCounters,
    Speed,
    SpentByRank,
    TimeSpent,
    bottleneck,
    in_words,
)


class Clock:
    """Goes on by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def second_by_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.time, "perf_counter", Clock())


def told(*ranks: TimeSpent) -> SpentByRank:
    return SpentByRank.of(ranks)


def rank(waited_s: float, **intake: float) -> TimeSpent:
    return TimeSpent(waited_s, LoaderCounters(**intake))  # type: ignore[arg-type]


@pytest.mark.usefixtures("second_by_second")
def test_step__rates_are_of_the_last_steps_and_all_ranks() -> None:
    meter = Speed(window=2)
    meter.step(10, told(rank(0.9, fetched=9_000_000), rank(0.0)))
    first = told(rank(1.0, fetched=10_000_000, cached=4, sought=8, reading_s=3.0, making_s=1.0), rank(0.0, sought=2))
    meter.step(20, first)
    meter.step(30, told(rank(1.1, fetched=10_000_000, cached=4, sought=8, reading_s=3.5, making_s=1.0),
                        rank(0.3, fetched=4_000_000, cached=1, sought=4, making_s=1.0)))  # fmt: skip
    after = told(rank(1.2, fetched=11_000_000, cached=9, sought=18, reading_s=4.0, making_s=2.0),
                 rank(0.6, fetched=5_000_000, cached=3, sought=6, making_s=4.5))  # fmt: skip
    found = meter.step(40, after)
    assert found.images_per_s == 35 and found.fetched_mb_per_s == pytest.approx(3.0)
    assert found.wait_share == pytest.approx(0.3)  # of the second rank: .6 of 2 s
    assert found.cache_hits == (5 + 3) / (10 + 4)
    assert found.reading_share == pytest.approx(1.0 / 6.5)
    assert found.bottleneck == "views"
    assert in_words(found) == "35 img/s  wait 30 % views"


@pytest.mark.usefixtures("second_by_second")
def test_step__counts_from_the_first_one() -> None:
    meter = Speed()
    found = meter.step(10, told(rank(0.5, fetched=2_000_000, reading_s=1.0)))
    assert found == (10, 0.5, 1.0, 2.0, None) and found.bottleneck == "reading"
    assert "cache" not in in_words(found)
    assert Speed().step(10, NOBODY) == (10, 0.0, 0.0, 0.0, None)  # of several ranks, nobody knows yet


@pytest.mark.parametrize(
    ("wait", "reading", "name"),
    [(0.04, 0.9, "training"), (0.06, 0.6, "reading"), (0.06, 0.4, "views"), (0.0, 0.0, "training")],
)
def test_bottleneck__is_what_the_slowest_waits_for(wait: float, reading: float, name: str) -> None:
    assert bottleneck(wait, reading) == name


def test_tally__of_one_rank_is_its_own() -> None:
    tally = RankCounters(Exchange(World()))
    tally.note(0.25, LoaderCounters(fetched=3))
    tally.note(0.5, LoaderCounters(fetched=7))
    assert tally.latest.ranks == [TimeSpent(0.75, LoaderCounters(fetched=7))]


def _told(world: World) -> list[list[TimeSpent]]:
    exchange, found = Exchange(world), list[list[TimeSpent]]()
    tally = RankCounters(exchange)
    steps = (
        (0.5 * world.rank, LoaderCounters(fetched=1 + world.rank)),
        (1.0, LoaderCounters(fetched=5, making_s=0.5)),
        (0, LoaderCounters()),
    )
    for step in steps:
        exchange.receive()
        tally.note(*step)
        found.append(tally.latest.ranks)
        exchange.send()
    return found


@pytest.mark.slow
def test_tally__tells_every_rank_of_all_a_step_late() -> None:
    first, second = run_ranks(2, _told)
    assert first == second == [
        [],
        [TimeSpent(0.0, LoaderCounters(fetched=1)), TimeSpent(0.5, LoaderCounters(fetched=2))],
        [TimeSpent(waited_s, LoaderCounters(fetched=5, making_s=0.5)) for waited_s in (1.0, 1.5)],
    ]  # fmt: skip


class Steps:
    """A meter, and steps of any length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        self.meter = Speed()

    def make(self, *seconds: float) -> None:
        for taken in seconds:
            self.now += taken
            self.meter.step(10, NOBODY)


def test_remaining__is_not_told_from_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.make(60.0, 10.0, 1.0, 1.0)  # compilation, caches
    assert math.isnan(steps.meter.training_s(100)) and duration(steps.meter.training_s(100)) == "?"
    steps.make(1.0)
    assert steps.meter.training_s(100) == pytest.approx(10.0)
    assert steps.meter.training_s(0) == 0.0


def test_remaining__knows_training_and_pauses_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.make(*[1.0] * 8)
    steps.now += 600  # a save
    steps.meter.pause("saves")
    steps.make(1.0)
    steps.now += 200  # another
    steps.meter.pause("saves")
    steps.now += 900
    steps.meter.pause("scores")
    steps.now += 7  # a rewind, say
    steps.meter.begin_anew()
    steps.make(30.0, 5.0, 1.0)  # the loader begins anew
    steps.make(3_600.0)  # the process was stopped
    assert steps.meter.training_s(100) == pytest.approx(10.0)
    assert steps.meter.pauses_s({"saves": 3, "scores": 2, "labels": 5}) == 3 * 400 + 2 * 900
