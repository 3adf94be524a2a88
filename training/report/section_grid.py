"""A grid of evaluations: its table beside published scores, and scores over pre-training where there are several
checkpoints of a run."""

from collections.abc import Sequence
from typing import Any

from datapipe.core.progress import counted
from training.report.curves import wide
from training.report.html_page import TableRow, escape, soft, table
from training.report.run_files import RunFiles
from training.report.section_retrieval import METRICS
from training.report.svg_plots import Curve, Plot

Row = dict[str, Any]
_HEAD = ("weights", "task", *(label for _, label in METRICS), "feature, or source", "remarks")
_NUMBERS = (2, 3, 4, 5, 6)
_ABOUT = ("Scores in percent. Below ours the published score of the same method of pre-training on the same data set, "
          "grey where ours cannot be held against it, with the reason.")  # fmt: skip


def grid_verdict(files: RunFiles) -> str:
    """How far the grid is, in a line."""
    states = [row["state"] for row in files.grid]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "complete"]
    said = ", ".join([f"{states.count('complete')} of {counted(len(states), 'cell')} complete", *parts])
    kind = " bad" if "failed" in states else " good" if set(states) <= {"complete", "left out"} else ""
    return f'<p class="verdict{kind}">{escape(said)}.</p>'


def grid_sections(files: RunFiles) -> list[tuple[str, str]]:
    """(title, content) of each section."""
    courses = _courses(files.grid)
    return [
        ("Scores", soft(_ABOUT) + "\n".join(_table_of(data, files.grid) for data in _values(files.grid, "data"))),
        *([("Scores over pre-training", courses)] if courses else ()),
    ]


def _table_of(data: str, rows: Sequence[Row]) -> str:
    lines: list[TableRow] = []
    for row in (row for row in rows if row["data"] == data):
        lines.append(_ours(row))
        if row["published_mAP"] is not None:
            lines.append(_published(row))
    return f"<h3>{escape(data)}</h3>" + table(_HEAD, lines, numbers=_NUMBERS)


def _ours(row: Row) -> TableRow:
    scores = [_number(row[name]) for name, _ in METRICS]
    if row["mAP"] is None:
        scores[0] = row["state"]
    best = (
        f"best of all milestones {row['best_mAP']:.1f}, chosen on the test set" if row["best_mAP"] is not None else ""
    )
    said = [row["remark"], row["why"], best, row["notes"]]
    cells = [row["weights"], row["task"], *scores, row["feature"] or "", "; ".join(one for one in said if one)]
    return TableRow(cells, main=row["state"] == "complete", grey=row["state"] == "left out")


def _published(row: Row) -> TableRow:
    scores = [_number(row["published_mAP"]), _number(row["published_rank1"]), "", "", ""]
    why = "published" if row["comparable"] else f"published; not comparable: {row['not_comparable']}"
    cells = [row["published_method"], row["task"], *scores, row["published_source"], why]
    return TableRow(cells, grey=not row["comparable"])


def _courses(rows: Sequence[Row]) -> str:
    """A plot for each task and data set with scores of several checkpoints of a run: mAP over its epochs, or its steps
    where the size of its data set is not known."""
    plots = []
    for task in _values(rows, "task"):
        for data in _values(rows, "data"):
            own = [row for row in rows if (row["task"], row["data"]) == (task, data) and row["mAP"] is not None]
            unit = "epochs" if all(row["epochs"] is not None for row in own) else "step"
            several = [one for one in _values(own, "series") if sum(row["series"] == one for row in own) > 1]
            curves = [_curve(series, unit, own, strong=number == 0) for number, series in enumerate(several)]
            if curves:
                label = "epochs of pre-training" if unit == "epochs" else "steps of pre-training"
                plots.append(wide(Plot(f"mAP of {task} on {data}, %", curves, xlabel=label, wide=True)))
    return "\n".join(plots)


def _curve(series: str, unit: str, rows: Sequence[Row], *, strong: bool) -> Curve:
    points = sorted((row[unit], row["mAP"]) for row in rows if row["series"] == series and row[unit] is not None)
    return Curve(series, [at for at, _ in points], [score for _, score in points], strong=strong, dots=True)


def _values(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
