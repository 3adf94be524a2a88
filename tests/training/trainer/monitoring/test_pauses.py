"""What a run will still stand still for, counted by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import StorageConfig
from tests.training.trainer.monitoring.test_recorder import place
from training.checkpoint import retention
from training.checkpoint.settings import CheckpointConfig
from training.core.run_folder.run_folder import RunFolder
from training.trainer.monitoring import throughput
from training.trainer.monitoring.pauses import pauses
from training.trainer.monitoring.recorder import Recorder


def test_left__counts_what_comes_at_and_after_a_step() -> None:
    found = pauses(np.array([10, 20, 30]), segments=[25, 30], scores=[25, 30], labels=[])
    assert found.left(0, 100.0) == {"saves": 4, "scores": 2, "labels": 0}
    assert found.left(20, 100.0) == {"saves": 3, "scores": 2, "labels": 0}
    assert found.left(30, 0.0) == {"saves": 1, "scores": 1, "labels": 0}


def test_left__saves_by_the_clock() -> None:
    found = pauses(np.array([50]), save_every_s=600.0)
    assert found.left(0, 6_000.0)["saves"] == 10 and found.left(0, 60.0)["saves"] == 1
    assert found.left(0, math.nan)["saves"] == 1


@pytest.mark.parametrize("settings", [
    {"every_steps": 7}, {"every_steps": 0, "keep_every_epochs": 0.5}, {"every_steps": 10, "keep_every_steps": 4},
    {"every_steps": 9, "keep_every_steps": 5, "keep_every_epochs": 2.0}, {"every_steps": 0, "every_minutes": 5.0},
])  # fmt: skip
@pytest.mark.parametrize("epoch_steps", [12.0, 12.4, 3.999, math.inf])
def test_due_steps__are_those_at_which_a_save_is_due(settings: dict[str, float], epoch_steps: float) -> None:
    config = CheckpointConfig(**settings)  # type: ignore[arg-type]
    steps = range(1, 101)
    expected = [step for step in steps if retention.due(config, step, epoch_steps)]
    assert retention.due_steps(config, 100, epoch_steps).tolist() == expected
    expected = [step for step in steps if retention.kept(config, step, epoch_steps)]
    assert retention.kept_steps(config, 100, epoch_steps).tolist() == expected


def test_recorder__the_time_left_has_saves_scores_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of a second each are left, 3 saves of 5 s, 2 scores of 60 s, and labels once, which take 30 s."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    come = pauses(np.array([10, 15]), scores=[10, 20], labels=[15], segments=[20])
    folder = RunFolder(str(tmp_path), StorageConfig())
    recorder = Recorder(folder, about={}, total_steps=20, pauses=come)
    recorder.begin()

    def pause(seconds: float) -> None:
        now[0] += seconds

    for step in range(10):
        pause(1.0)
        recorder.speed.step(64, [])
        if step == 4:
            pause(5.0)
            recorder.paused()
            pause(60.0)
            recorder.scored(5, "people", {"mAP": 0.5, "rank1": 0.5})
            pause(30.0)
            recorder.labelled()
    left = recorder._left_s(place(9, 20), 64)
    recorder.close()
    assert left == pytest.approx(10 * 1.0 + 3 * 5.0 + 2 * 60.0 + 30.0)
