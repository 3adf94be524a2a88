"""The table of a grid: a row for each cell, beside the published score that is nearest to it.

OUT/table.parquet, table.json    all columns        OUT/table.md    what a person reads
"""

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from datapipe.storage import Store
from training.evaluation import evaluation
from training.grid.cells import Cell
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.literature import LiteratureRow
from training.report.section_published import alike, not_comparable

TABLE = "table"
METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")
COLUMNS = pyarrow.schema(
    [
        *((name, pyarrow.string()) for name in ("weights", "series", "checkpoint")),
        ("step", pyarrow.int64()),
        ("samples", pyarrow.int64()),
        ("epochs", pyarrow.float64()),
        *((name, pyarrow.string()) for name in ("pretraining", "arch", "task", "data", "data_set", "state", "why",
                                                "feature")),
        *((name, pyarrow.float64()) for name in METRICS),
        ("rule", pyarrow.string()),
        ("best_mAP", pyarrow.float64()),
        ("published_mAP", pyarrow.float64()),
        ("published_rank1", pyarrow.float64()),
        ("published_method", pyarrow.string()),
        ("published_source", pyarrow.string()),
        ("comparable", pyarrow.bool_()),
        ("not_comparable", pyarrow.string()),
        ("notes", pyarrow.string()),
        ("remark", pyarrow.string()),
        ("folder", pyarrow.string()),
        ("seconds", pyarrow.float64()),
    ]
)  # fmt: skip
"""Scores are in percent. `state`: complete, failed, left out, waiting or under way; `why`: of failed and left out ones.
`best_mAP`: of all milestones, chosen on the test set. `comparable`: null where nothing is published."""


def row_of(cell: Cell, state: str, why: str, result: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the table; of a cell without a result, what is known of it."""
    weights = cell.weights
    row: dict[str, Any] = dict.fromkeys(COLUMNS.names) | {
        "weights": weights.name,
        "series": weights.series,
        "checkpoint": weights.checkpoint,
        "step": weights.step,
        "samples": weights.samples,
        "epochs": weights.epochs,
        "task": str(cell.task),
        "data": cell.data.name,
        "data_set": cell.data.set_name,
        "state": state,
        "why": why,
        "remark": cell.remark,
        "folder": cell.folder,
    }
    return row if result is None else row | _scores(result) | _published(result["metrics"])


def left_out_row(*, task: str, weights: str, data: str, why: str) -> dict[str, Any]:
    """The row of a cell that there cannot be."""
    named = {"weights": weights, "series": weights, "task": task, "data": data, "state": "left out", "why": why}
    return dict.fromkeys(COLUMNS.names) | named


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    metrics = result["metrics"]
    model = metrics["settings"]["model"]
    data = metrics["data"]
    scores = evaluation.headline(metrics)
    best = result.get("best")
    return {
        "pretraining": model["family"],
        "arch": model["arch"] + (f" + {model['parts']} parts" if model["parts"] else ""),
        "feature": metrics["headline"],
        **{name: 100 * scores[name] for name in METRICS},
        "rule": result["rule"],
        "best_mAP": 100 * best["mAP"] if best else None,
        "notes": "; ".join([*data.get("differences", ()), *data.get("warnings", ())]),
        "seconds": result["seconds"],
    }


def _published(metrics: dict[str, Any]) -> dict[str, Any]:
    """The published score nearest to ours: of the same method of pre-training and the same data set, of the same task
    where there is one, with the fewest reasons why ours cannot be held against it."""
    family, data = metrics["settings"]["model"]["family"], metrics["data"]["name"]
    rows = [(row, not_comparable(row, metrics)) for row in alike(metrics) if row.data == data and row.family == family]
    rows = rows if family else []
    if not rows:
        return {}
    row, reasons = min(rows, key=lambda pair: (_other_task(pair[0], metrics), len(pair[1])))
    return {
        "published_mAP": row.mAP,
        "published_rank1": row.rank1,
        "published_method": row.method,
        "published_source": row.source,
        "comparable": not reasons,
        "not_comparable": "; ".join(reasons),
    }


def _other_task(row: LiteratureRow, metrics: dict[str, Any]) -> bool:
    return bool(row.task != metrics["settings"]["model"]["task"])


def write(store: Store, rows: Sequence[dict[str, Any]]) -> None:
    """Write all three files."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), COLUMNS), sink)
    store.replace(f"{TABLE}.parquet", sink.getvalue())
    store.replace(f"{TABLE}.json", (json.dumps({"rows": list(rows)}, indent=1) + "\n").encode())
    store.replace(f"{TABLE}.md", markdown(rows).encode())


_HEAD = ("weights", "task", "data set", "mAP", "Rank-1", "Rank-5", "Rank-10", "mINP", "published mAP / Rank-1",
         "source", "remarks")  # fmt: skip


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The table for people. A published score that ours cannot be held against is in brackets, with the reasons."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * 3 + " ---: |" * 5 + " --- |" * 3]
    lines += ["| " + " | ".join(_escaped(cell) for cell in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    data = PUBLISHED[row["data_set"]].title if row["data_set"] in PUBLISHED else row["data"]
    scores = ["" if row[name] is None else f"{row[name]:.1f}" for name in METRICS]
    if row["mAP"] is None:
        scores[0] = row["state"]
    return [row["weights"], row["task"], data, *scores, published_in_words(row), row["published_source"] or "",
            "; ".join(remarks(row))]  # fmt: skip


def published_in_words(row: dict[str, Any]) -> str:
    """The published score of a row, in brackets where ours cannot be held against it; empty: none."""
    if row["published_mAP"] is None:
        return ""
    rank1 = "" if row["published_rank1"] is None else f" / {row['published_rank1']:.1f}"
    score = f"{row['published_mAP']:.1f}{rank1}"
    return score if row["comparable"] else f"({score})"


def remarks(row: dict[str, Any]) -> list[str]:
    """What is to be said of a row beside its numbers."""
    said = [row["remark"], row["why"], f"not comparable: {row['not_comparable']}" if row["not_comparable"] else "",
            "best of all milestones, chosen on the test set" if (row["rule"] or "").startswith("the best") else "",
            row["notes"]]  # fmt: skip
    return [one for one in said if one]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def plain(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head = ("weights", "task", "data", "mAP", "R1", "published", "")
    lines = [(row["weights"], row["task"], row["data"], row["state"] if row["mAP"] is None else f"{row['mAP']:.1f}",
              "" if row["rank1"] is None else f"{row['rank1']:.1f}", published_in_words(row),
              "; ".join(filter(None, (row["remark"], row["why"]))).partition("\n")[0]) for row in rows]  # fmt: skip
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(6)]
    padded = ([*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[6]]
              for line in [head, *lines])  # fmt: skip
    return "\n".join("  ".join(cells).rstrip() for cells in padded)  # fmt: skip
