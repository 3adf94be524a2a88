"""The line about a step: what must be in it is, what may be in it is where 100 columns allow."""

from pathlib import Path

from datapipe.core.config import StorageConfig
from training.core.run_folder.run_folder import RunFolder
from training.methods.base import TrainingProgress as Place
from training.trainer.monitoring.recorder import COLUMNS, LEGEND, Recorder, fitted
from training.trainer.monitoring.throughput import Rates


def place(step: int, steps: int) -> Place:
    """Before the step that follows so many."""
    return Place(0, step, 0, 0.0, total_steps=steps, epoch_steps=100.0, seed=0)


def said(folder: Path, step: int, steps: int, speed: float, **losses: float) -> str:
    recorder = Recorder(RunFolder(str(folder), StorageConfig()), about={}, total_steps=steps)
    rates = Rates(speed, 0.124, 0.9, 7.5, 0.5)
    line = {"step": step, "loss": 10.68431, **losses, "grad_norm": 1586.39, "lr": 4.98e-4}
    return recorder._status(place(step - 1, steps), line, 64, rates)


def test_status__of_a_short_run_has_all_of_it(tmp_path: Path) -> None:
    line = said(tmp_path, 84, 360, 98.0, loss_cls=2.95)
    assert line.startswith("step 84/360 23.3 %  loss 10.6843 (cls 2.950)  |g| 1.59e+03  98 img/s  wait 12 % reading")
    assert "  left " in line and len(line) <= COLUMNS


def test_status__of_a_long_one_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    losses = {"loss_cls": 10.1, "loss_part": 9.5, "loss_patch": 12.25, "loss_feature": 3.5}
    line = said(tmp_path, 1_125_000, 2_816_400, 112_345.6, mfu=0.314, **losses)
    assert (
        len(line) <= COLUMNS
        and "loss 10.6843" in line
        and "MFU 31 %" in line
        and "112,346 img/s" in line
        and "patch" not in line
    )
    assert max(map(len, LEGEND)) <= COLUMNS


def test_status__tells_utilisation_where_it_is_known(tmp_path: Path) -> None:
    assert "98 img/s  wait 12 % reading  MFU 31 %  left " in said(tmp_path, 84, 360, 98.0, mfu=0.314)


def test_fitted__the_first_of_what_may_be_left_out_come_first() -> None:
    assert (
        fitted(("a" * 90, True), ("b" * 6, False), ("c" * 6, False), ("d" * 4, False)) == "a" * 90 + "b" * 6 + "d" * 4
    )
