"""Lines about long work: rate and time left, told once they can be known, to whoever listens."""

import math

import pytest

from datapipe.core import progress
from datapipe.core.progress import Progress, counted, duration, lines_sent_to


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(progress.time, "monotonic", moved)
    return moved


def test_progress__tells_rate_and_time_left(clock: Clock) -> None:
    lines: list[str] = []
    with lines_sent_to(lines.append), Progress("embed", 100, unit="images", quiet_s=5) as work:
        clock.now += 40  # the first batch: weights travel, kernels are chosen
        work.advance(10)
        assert math.isnan(work.left_s())
        for _ in range(4):
            clock.now += 2
            work.advance(10)
    assert lines[0] == "embed:  10%, 10 of 100 images, 0 images/s, ? left"
    assert work.left_s() == pytest.approx(10)  # 50 images at 5 a second, not at what the first one took
    assert lines[-1] == "embed:  50%, 50 of 100 images, 1 images/s, 48.0 s"


def test_progress__speaks_after_two_seconds_and_then_every_ten(clock: Clock) -> None:
    lines: list[str] = []
    with lines_sent_to(lines.append), Progress("work", 30, unit="images") as work:
        for _ in range(30):
            clock.now += 1
            work.advance(1)
        assert [line.split(" of")[0].split()[-1] for line in lines] == ["2", "12", "22"]
        assert lines[-1].endswith(", 8 s left")


def test_progress__of_short_work_leaves_no_line(clock: Clock) -> None:
    lines: list[str] = []
    with lines_sent_to(lines.append), Progress("rank", 10, unit="queries", quiet_s=5) as work:
        clock.now += 1
        assert list(work.over(iter([[1, 2], [3]]), len)) == [[1, 2], [3]]
    assert work.done == 3 and not lines


def test_progress__goes_to_stderr_without_a_carriage_return(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scan", 8e6) as work:
        clock.now += 4
        work.advance(8e6, "3 crops", crops=3)
    shown = capsys.readouterr()
    assert shown.out == "" and "\r" not in shown.err
    assert shown.err.splitlines()[-1] == "scan: 100%, 3 crops, 1 crops/s, 2.0 MB/s, 4.0 s"


def test_duration__of_what_is_not_known() -> None:
    assert [duration(value) for value in (math.nan, math.inf, 3.2, 600)] == ["?", "?", "3 s", "10 min"]


def test_duration__reads_well() -> None:
    assert [duration(value) for value in (0.4, 119.6, 51_600, 273_600)] == ["0 s", "2 min", "14 h 20", "3 d 4 h"]


def test_counted__in_the_singular_and_the_plural() -> None:
    said = [counted(number, noun) for number in (0, 1, 2_000) for noun in ("crop", "process")]
    assert said == ["0 crops", "0 processes", "1 crop", "1 process", "2,000 crops", "2,000 processes"]
