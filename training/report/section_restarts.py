"""The report's account of restarts, and of each rank's part in the time: who kept the others waiting, who for data."""

import statistics
from datetime import UTC, datetime
from typing import Any

from datapipe.core.progress import duration
from training.report.html_page import TableRow, count, percent, soft, table
from training.report.run_files import RunFiles

HISTORY, PACE = "restarts.jsonl", "ranks/pace.jsonl"
MOST_ROWS = 200


def restarts_section(files: RunFiles) -> str:
    """Tables of restarts and of slow ranks; nothing for a run without Ray."""
    return "\n".join(part for part in (_restarts(files), _ranks(files)) if part)


def _restarts(files: RunFiles) -> str:
    records = files.lines(HISTORY)
    if not records:
        return ""
    head = ("when (UTC)", "what", "why", "workers", "after step", "from step", "in a row", "waited")
    rows = [_row(record) for record in records[-MOST_ROWS:]]
    left_out = len(records) - len(rows)
    note = soft(f"{left_out:,} earlier ones are in {HISTORY}.") if left_out else ""
    return table(head, rows, numbers=(3, 4, 5, 6, 7)) + note


def _row(record: dict[str, Any]) -> TableRow:
    when = datetime.fromtimestamp(record["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    numbers = [count(record.get(key)) for key in ("workers", "step", "saved", "in_a_row")]
    return TableRow([when, record["kind"], record["reason"], *numbers, duration(record.get("delay_s", 0.0))])


def _ranks(files: RunFiles) -> str:
    """Means over the whole of the last size of the group."""
    windows = files.lines(PACE)
    windows = [window for window in windows if len(window["own_s"]) == len(windows[-1]["own_s"])]
    if not windows:
        return ""
    own = zip(*(window["own_s"] for window in windows), strict=True)
    waits = zip(*(window["wait_share"] for window in windows), strict=True)
    rows = [
        TableRow([str(rank), f"{statistics.fmean(seconds):.3f} s", percent(statistics.fmean(shares))])
        for rank, (seconds, shares) in enumerate(zip(own, waits, strict=True))
    ]
    note = "A step takes as long on all ranks; what a rank needs by itself is its forward pass and waiting for data."
    return soft(note) + table(("rank", "by itself, per step", "waits for data"), rows, numbers=(0, 1, 2))
