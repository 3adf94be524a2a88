"""States of cells: sources first, other attempts, failures that spare the rest; and the rows of the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.storage import open_store
from training.grid.carry_out import RESULT
from training.grid.cells import Cell, GridData, GridWeights, folder_of
from training.grid.planning import LeftOut
from training.grid.progress import ATTEMPTS, GridProgress
from training.grid.request import GridTask, TaskKind
from training.reid.settings import ScoringConfig

DATA = GridData("market1501", "/data/market1501", "market1501", "", ScoringConfig(), "", True)
WEIGHTS = GridWeights("pass@step_0000120", "runs/pass", "/w", "ab" * 32, "step_0000120", 120, 6_000, 2_000)


def cell(out: Path, kind: TaskKind, source: str = "") -> Cell:
    task = GridTask(kind, "msmt17" if source else "")
    return Cell(folder_of(WEIGHTS, DATA, task.folder), WEIGHTS, DATA, task, str(out), StorageConfig(), "/w", source)


def metrics(mean: float, task: str, **model: Any) -> dict[str, Any]:
    """As a metrics.json has it, of PASS's ViT-S on Market-1501."""
    about = {"family": "pass", "task": task, "arch": "vit_small", "stem": "patch", "parts": 3, "trained_on": "",
             "label_fraction": 1.0, "source": "", "fusion": "cat", **model}  # fmt: skip
    scores = {"mAP": mean, "rank1": 0.95, "rank5": 0.97, "rank10": 0.98, "mINP": 0.5}
    return {"features": {"cls+parts": scores}, "headline": "cls+parts", "step": 1,
            "settings": {"model": about, "size": [256, 128]},
            "data": {"name": "market1501", "differences": [], "warnings": [], "counts": {}}}  # fmt: skip


def result(of: Cell, mean: float, task: str, **model: Any) -> dict[str, Any]:
    return {"identity": of.identity, "seconds": 1.0, "rule": "the last", "metrics": metrics(mean, task, **model)}


@pytest.fixture
def progress(tmp_path: Path) -> GridProgress:
    return GridProgress(open_store(str(tmp_path)))


def test_progress__a_cell_waits_for_its_source(tmp_path: Path, progress: GridProgress) -> None:
    source = cell(tmp_path, "supervised")
    adapted = cell(tmp_path, "uda", source.folder)
    progress.add([source, adapted])
    assert progress.next() is source
    progress.begin(source)
    assert progress.next() is None and progress.under_way == 1
    progress.complete(source, result(source, 0.9, "supervised"))
    assert progress.next() is adapted


def test_progress__what_may_pass_is_tried_again_and_what_lasts_is_not(tmp_path: Path, progress: GridProgress) -> None:
    scored, source = cell(tmp_path, "zero-shot"), cell(tmp_path, "supervised")
    adapted = cell(tmp_path, "uda", source.folder)
    progress.add([source, scored, adapted])
    for _ in range(ATTEMPTS):
        assert progress.next() is source
        progress.begin(source)
        progress.failed(source, StorageError("the store is gone", where="s3://b"))
    states = {row["task"]: (row["state"], row["why"]) for row in progress.rows()}
    assert states["supervised"][0] == "failed" and "the store is gone" in states["supervised"][1]
    assert states["uda:msmt17"] == ("failed", f"{source.folder} failed, which it begins with")
    assert progress.next() is scored  # the rest goes on
    progress.begin(scored)
    progress.failed(scored, DataError("broken image"))
    assert progress.next() is None and progress.failures == 3  # one attempt: it would fail again


def test_progress__what_was_complete_stays_so_with_the_same_weights_and_settings(
    tmp_path: Path, progress: GridProgress
) -> None:
    scored = cell(tmp_path, "zero-shot")
    folder = tmp_path / scored.folder
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps(result(scored, 0.5, "zero-shot") | {"identity": "other"}))
    progress.add([scored])
    assert progress.next() is scored
    (folder / RESULT).write_text(json.dumps(result(scored, 0.5, "zero-shot")))
    again = GridProgress(open_store(str(tmp_path)))
    again.add([scored])
    assert again.next() is None and again.rows()[0]["mAP"] == 50


def test_table__has_the_published_row_that_is_nearest(tmp_path: Path, progress: GridProgress) -> None:
    source = cell(tmp_path, "supervised")
    cells = {
        kind: cell(tmp_path, kind, source.folder if kind == "uda" else "") for kind in ("supervised", "usl", "uda")
    }
    progress.add(cells.values(), [LeftOut("uda:market1501", "pass", "market1501", "it is the source")])
    origins = {"supervised": "", "usl": "", "uda": "msmt17"}
    for kind, one in cells.items():
        progress.begin(one)
        progress.complete(one, result(one, 0.9, kind, source=origins[kind]))
    rows = {row["task"]: row for row in progress.rows()}
    published = {task: (row["published_mAP"], row["not_comparable"]) for task, row in rows.items() if row["mAP"]}
    assert published == {"supervised": (92.2, ""), "usl": (88.5, ""), "uda:msmt17": (90.2, "")}
    assert rows["supervised"]["epochs"] == 3.0 and rows["supervised"]["series"] == "pass"
    markdown = (tmp_path / "table.md").read_text()
    assert "| 92.2 / 96.3 |" in markdown and "| left out |" in markdown


def test_table__a_score_that_cannot_be_held_against_ours_says_why(tmp_path: Path, progress: GridProgress) -> None:
    adapted = cell(tmp_path, "uda")
    progress.add([adapted])
    progress.begin(adapted)
    progress.complete(adapted, result(adapted, 0.9, "uda", source="dukemtmc"))
    (row,) = progress.rows()
    assert row["comparable"] is False and "theirs was fine-tuned on msmt17 before" in row["not_comparable"]
    assert "(90.2 / 95.8)" in (tmp_path / "table.md").read_text()
