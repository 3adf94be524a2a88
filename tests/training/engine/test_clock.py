import pytest

from datapipe.core.errors import ConfigError
from training.engine.clock import Clock


def test_clock__counts_whole_batches_only() -> None:
    clock = Clock(batch=8, epoch_samples=20, epochs=2, seed=1)
    assert (clock.total_steps, clock.end, clock.epoch_steps) == (5, 40, 2.5)
    assert [clock.at(samples).epoch for samples in (0, 8, 16, 24, 32)] == [0, 0, 0, 1, 1]
    assert [clock.at(samples).step for samples in (0, 8, 16)] == [0, 1, 2]
    assert clock.at(16).fraction == pytest.approx(0.4)


def test_clock__fractions_of_an_epoch_do_not_lose_a_step_to_rounding() -> None:
    assert Clock(batch=10, epoch_samples=100, epochs=0.3, seed=0).total_steps == 3


def test_clock__refuses_a_run_shorter_than_a_batch() -> None:
    with pytest.raises(ConfigError, match="less than one batch of 21"):
        Clock(batch=21, epoch_samples=20, epochs=1, seed=0)
