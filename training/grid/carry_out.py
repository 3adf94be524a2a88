"""One cell of a grid carried out in this process: scored as it is, or trained first and scored by its own run.

<cell>/cell.json      its scores, once it is complete; a cell that has it is not carried out again
<cell>/evaluation/, report.html, and for one that trains its whole run folder
"""

import json
import time
from typing import Any

import torch

from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.progress import lines_sent_to
from datapipe.storage import open_store
from training.core.devices import Device
from training.core.host import Host
from training.evaluation import evaluation
from training.evaluation.evaluation import EXPORTED, ScoringTask
from training.grid.cells import Cell
from training.reid.zero_shot import Weights
from training.report.report import write_report
from training.trainer.milestones import SUMMARY
from training.trainer.pretrain import pretrain_alone

RESULT = "cell.json"


def result_of(cell: Cell) -> dict[str, Any] | None:
    """The content of its cell.json, as `carry_out` returns it; None: it is not complete, or was with other weights,
    data or settings."""
    try:
        result = open_store(cell.url, cell.storage).read_record(RESULT)
    except (NotFoundError, DataError):
        return None
    return result if result.get("identity") == cell.identity else None


def carry_out(cell: Cell, host: Host, *, device: torch.device, threads: int = 2) -> dict[str, Any] | None:
    """Carry out a cell, from where it was left: its result, as plain values, which is written too; None where the host
    was told to stop on the way.

    `device`: of this process; `threads`: of loading, for a cell that is scored as it is. Raises UserError.
    """
    if (before := result_of(cell)) is not None:
        return before
    began = time.monotonic()
    scores = _scored(cell, host, device, threads) if cell.config is None else _trained(cell, host, device)
    if scores is None:
        return None
    result = {**cell.about(), "identity": cell.identity, "seconds": round(time.monotonic() - began, 1), **scores}
    write_report(cell.url, cell.storage)
    open_store(cell.url, cell.storage).replace(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _scored(cell: Cell, host: Host, device: torch.device, threads: int) -> dict[str, Any]:
    weights = Weights(EXPORTED, cell.weights.step, cell.weights.samples)
    task = ScoringTask(cell.start, cell.data.url, weights, cell.storage, cell.data.scoring, cell.url)
    with lines_sent_to(host.show_line):
        return {"rule": "the weights as they are", "metrics": evaluation.score(task, threads=threads, device=device)}


def _trained(cell: Cell, host: Host, device: torch.device) -> dict[str, Any] | None:
    config = cell.config
    assert config is not None
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    if not pretrain_alone(config, host, device=kind, index=device.index or 0).complete:
        return None
    summary = open_store(config.out, config.storage).read_record(SUMMARY)
    best = evaluation.headline(summary["best"])
    return {
        "rule": summary["rule"],
        "metrics": summary["result"],
        "best": {"weights": summary["best"]["weights"], **best},
    }
