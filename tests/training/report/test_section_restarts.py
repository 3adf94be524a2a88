"""Restarts and the ranks' parts in the time, as the report shows them."""

import json
from pathlib import Path

from datapipe.core.config import StorageConfig
from training.core.run_folder.run_folder import RunFolder
from training.report.run_files import RunFiles
from training.report.section_restarts import MOST_ROWS, restarts_section


def _section(root: Path) -> str:
    return restarts_section(RunFiles(RunFolder(str(root), StorageConfig())))


def test_restarts_section__reasons_and_ranks(tmp_path: Path) -> None:
    assert _section(tmp_path) == ""
    folder = RunFolder(str(tmp_path), StorageConfig())
    record = {"time": 1_790_000_000, "kind": "crash", "reason": "rank 1 on <b>: died", "workers": 4, "step": 1_234,
              "saved": 1_200, "in_a_row": 2, "delay_s": 4.0}  # fmt: skip
    for _ in range(MOST_ROWS + 3):
        folder.append("restarts.jsonl", json.dumps(record))
    folder.append("restarts.jsonl", json.dumps({"time": 1_790_000_000, "kind": "end", "reason": "stopped"}))
    folder.append("restarts.jsonl", '{"time": 17900')
    for own in ([9.0, 9.0, 9.0], [0.25, 0.5], [0.25, 1.0]):
        folder.append("ranks/pace.jsonl", json.dumps({"step": 1, "own_s": own, "wait_share": [0.1] * len(own)}))
    said = _section(tmp_path)
    assert "rank 1 on &lt;b&gt;: died" in said and "1,234" in said and "stopped" in said
    assert "4 earlier ones" in said
    assert "0.750 s" in said and "9.000" not in said and "10.0 %" in said
