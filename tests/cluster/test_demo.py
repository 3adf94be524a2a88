"""The whole flow of `make demo`, small: on rendered crops and on a slice of real ones."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.demo import Demo, _judge
from datapipe.core.cli import COMPLETE, FAILED
from tests.end_to_end.tiny import command, finished


def _scores(run: Path, weights: str, step: int | None, value: float) -> None:
    folder = run / "evaluation" / "crops" / weights
    folder.mkdir(parents=True)
    row = {"weights": weights, "step": step, "headline": "cls", "features": {"cls": {"mAP": value}}}
    (folder / "metrics.json").write_text(json.dumps(row))


@pytest.mark.parametrize(("reached", "verdict"), [(0.31, COMPLETE), (0.19, FAILED), (0.14, FAILED)])
def test_judge__demands_three_times_random_and_more_than_colour(tmp_path: Path, reached: float, verdict: int) -> None:
    demo = Demo(tmp_path, tmp_path / "crops", own=False, seed=1, steps=0)
    for weights, step, value in (("random", 0, 0.05), ("colour_histogram", None, 0.20), ("step_0000010", 10, 0.4)):
        _scores(demo.run, weights, step, value)
    _scores(demo.run, "step_0000020", 20, reached)
    assert _judge(demo) == verdict
    own = Demo(tmp_path, tmp_path / "crops", own=True, seed=1, steps=0)
    assert _judge(own) == COMPLETE


@pytest.mark.slow
def test_demo__on_a_slice_of_real_crops(tmp_path: Path, real_crops: Path) -> None:
    crops = tmp_path / "crops"
    for folder, count in (("bounding_box_train", 96), ("query", 12), ("bounding_box_test", 80)):
        (crops / folder).mkdir(parents=True)
        for path in sorted((real_crops / folder).glob("*.jpg"))[:count]:
            shutil.copy(path, crops / folder)
    words = ("demo", "--out", str(tmp_path / "demo"), "--crops", str(crops), "--steps", "12")
    code, output, errors = finished(command("cluster", *words), timeout_s=500)
    assert code == 0, output + errors
    report = tmp_path / "demo" / "run" / "report.html"
    assert output.rstrip().splitlines()[-1] == str(report)
    assert "== kill -9 " in output and "goes on from step_" in output
    assert "the margin is reported, not demanded" in output
    assert 10_000 < report.stat().st_size < 20_000_000
    assert (tmp_path / "demo" / "preview.jpg").is_file()
    code, again, errors = finished(command("cluster", *words), timeout_s=500)
    assert code == 0, again + errors
    assert "already complete" in again and "== kill -9 " not in again


@pytest.mark.soak
def test_demo__a_folder_without_labels_ends_without_scores(tmp_path: Path, real_crops: Path) -> None:
    crops = tmp_path / "crops" / "deeper"
    crops.mkdir(parents=True)
    for number, path in enumerate(sorted((real_crops / "bounding_box_train").glob("*.jpg"))[:80]):
        shutil.copy(path, crops / f"person {number}.jpg")
    words = ("demo", "--out", str(tmp_path / "demo"), "--crops", str(crops.parent), "--steps", "4")
    code, output, errors = finished(command("cluster", *words), timeout_s=500)
    assert code == 0, output + errors
    assert "nothing to score" in output
    assert (tmp_path / "demo" / "run" / "report.html").is_file()


def test_demo__no_such_crops(tmp_path: Path) -> None:
    code, _, errors = finished(command("cluster", "demo", "--out", str(tmp_path), "--crops", str(tmp_path / "absent")))
    assert code == 1 and "no such folder" in errors and "Traceback" not in errors
