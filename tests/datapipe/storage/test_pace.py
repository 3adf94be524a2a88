"""A budget of requests per second, by a clock of the test."""

from threading import Thread

import pytest

from datapipe.storage.pace import UNLIMITED, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("per_s", [0.5, 1.0, 3.0, 250.0])
def test_delay__no_second_has_more_than_twice_the_budget_and_in_the_long_run_it_is_kept(per_s: float) -> None:
    clock = Clock()
    pace = Pace(per_s, clock)
    begins = [clock.now + pace.delay_s() for _ in range(200)]
    assert begins == sorted(begins)
    assert (len(begins) - 1) / (begins[-1] - begins[0]) == pytest.approx(per_s)
    clock.now = begins[-1] + 60  # a pause
    begins = [clock.now + pace.delay_s() for _ in range(200)]
    at_once = sum(begin < clock.now + 1e-6 for begin in begins)
    assert at_once == max(1, min(200, int(per_s)))
    assert (len(begins) - 1) / (begins[-1] - begins[0] + 1) <= per_s + 1e-6


def test_pace__without_a_budget_nobody_waits() -> None:
    assert {UNLIMITED.delay_s() for _ in range(1_000)} == {0.0}
    with pytest.raises(ValueError):
        Pace(-1)


def test_end__wakes_who_waits() -> None:
    pace = Pace(1e-6)
    pace.wait()
    waiting = Thread(target=pace.wait, daemon=True)
    waiting.start()
    pace.end()
    waiting.join(60)
    assert not waiting.is_alive()
