"""Scores of a run beside those that publications report: what is comparable, and why the rest is not."""

from typing import Any

from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.literature import ROWS, LiteratureRow, Task
from training.report.html_page import TableRow, details, escape, missing, soft, table
from training.report.run_files import RunFiles, Score

_HEAD = ("method", "backbone", "height × width", "data set", "mAP", "Rank-1", "source", "comparable")
_ABOUT = "Scores of the literature, without re-ranking, for weights of the same kind, on the same data."
_NONE = "No score of the literature can be held against ours: another data set, size of images, backbone or task."


def published_section(files: RunFiles) -> str:
    """One table for each test set."""
    tables = [_beside(test_set.last) for test_set in files.test_sets if test_set.last]
    return "\n".join(tables) or missing("evaluation/<set>/<weights>/metrics.json")


def _beside(score: Score) -> str:
    title = f"<h3>{escape(score.set_name)}, {escape(score.weights)}</h3>"
    if "model" not in score.content.get("settings", {}):
        return title + soft("metrics.json does not say what the weights are: score them again.")
    rows = [_row(row, not_comparable(row, score.content)) for row in alike(score.content)]
    if not rows:
        return title + soft("Nothing is published for weights of this kind, nor on this data set.")
    same, other = ([row for row in rows if row.grey == grey] for grey in (False, True))
    parts = [title, soft(_ABOUT if same else _NONE)]
    if same:
        parts.append(table(_HEAD, [_ours(score), *same], numbers=(4, 5)))
    if other:
        number = "1 published score" if len(other) == 1 else f"{len(other)} published scores"
        folded = table(_HEAD, [_ours(score), *other], numbers=(4, 5))
        parts.append(details(f"{number} that cannot be held against ours, and why", folded))
    return "\n".join(parts)


def alike(content: dict[str, Any]) -> list[LiteratureRow]:
    """Rows for weights that were pre-trained by the same method; if none were, those on the same data set."""
    model, data = content["settings"]["model"], content["data"]["name"]
    possible = [row for row in ROWS if not row.impossible]
    family = [row for row in possible if row.family and row.family == model["family"]]
    return family or [row for row in possible if row.data == data]


def not_comparable(row: LiteratureRow, content: dict[str, Any]) -> list[str]:
    """Why a published score cannot be held against ours; empty: it can."""
    settings, data = content["settings"], content["data"]
    model = settings["model"]
    backbone = (model["arch"], model["stem"], model["parts"])
    reasons = {
        "another data set": row.data != data["name"],
        "our data set is not whole": row.data == data["name"] and bool(data["differences"]),
        "another size of images": list(row.size) != list(settings["size"]),
        "another backbone": bool(row.arch) and (row.arch, row.stem, row.parts) != backbone,
        "another fusion of CLS and parts": row.task == model["task"]
        and row.fusion not in ("", model.get("fusion") or row.fusion),
        f"theirs is {_task_in_words(row.task)}, ours {_task_in_words(model['task'])}": row.task != model["task"],
        f"theirs was fine-tuned on {row.origin} before": row.task == model["task"] == "uda"
        and row.origin != model.get("source", ""),
        f"ours is fine-tuned on {model['trained_on']}": model["trained_on"] not in ("", data["name"]),
        "ours has fewer labels": model["label_fraction"] < 1,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _task_in_words(task: Task) -> str:
    return {"zero-shot": "not fine-tuned", "supervised": "fine-tuned"}.get(task, task)


def _ours(score: Score) -> TableRow:
    settings = score.content["settings"]
    model = settings["model"]
    cells = [f"ours ({score.weights}, {score.headline})", model["arch"], _size(settings["size"]), score.set_name]
    return TableRow([*cells, *(_percent(score.value(key)) for key in ("mAP", "rank1")), "this run", ""], main=True)


def _row(row: LiteratureRow, reasons: list[str]) -> TableRow:
    data = PUBLISHED[row.data].title if row.data in PUBLISHED else row.data
    rank1 = "" if row.rank1 is None else f"{row.rank1:.1f}"
    cells = [row.method, row.arch, _size(row.size), data, f"{row.mAP:.1f}", rank1, row.source]
    return TableRow([*cells, f"no: {'; '.join(reasons)}" if reasons else "yes"], grey=bool(reasons))


def _size(size: Any) -> str:
    return f"{size[0]}\u00a0×\u00a0{size[1]}"  # not broken between lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
