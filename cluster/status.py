"""How runs stand, from their files alone: local or on object storage, whoever and wherever the driver is."""

import json
import time
from typing import Any, NamedTuple

from cluster.train.restart_policy import END, HISTORY
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.progress import duration
from training import checkpoint
from training.config.continuation import saved_config
from training.config.run_plan import clock_of
from training.core.run_folder.append_files import FLUSH_S
from training.core.run_folder.run_folder import RunFolder
from training.report.run_files import RunFiles

CONFIG = "config.toml"
SILENT_S = 3 * FLUSH_S
"""Seconds without a sign of life after which nobody is at work on a run."""


class Status(NamedTuple):
    """One run."""

    run: str
    state: str
    """complete, running, stopped, failed, silent (ended without a word), or not begun."""
    step: int
    steps: int
    """Of the whole run; 0 where the size of the data set is not known yet."""
    age_s: float | None
    """Since its last sign of life; None without one."""
    workers: int
    restarts: int
    checkpoints: int
    reason: str
    """Of the last restart."""
    waits: tuple[float, ...]
    """Of each rank the part of the time that it waited for data, last told."""


def statuses(place: str, storage: StorageConfig) -> list[Status]:
    """The status of the run folder `place`, or of every run below it. Raises DataError where there is none."""
    folder = RunFolder(place, storage)
    names = [name for name in folder.names("") if name == CONFIG or name.endswith(f"/{CONFIG}")]
    runs = [place] if CONFIG in names else [f"{place.rstrip('/')}/{name[: -len(CONFIG) - 1]}" for name in sorted(names)]
    if not runs:
        raise DataError("no run here", where=place, hint="give a run folder, or a folder of runs")
    return [status(run, storage) for run in runs]


def status(run: str, storage: StorageConfig, *, now: float | None = None) -> Status:
    """The status of one run folder; `now`: seconds since 1970."""
    folder = RunFolder(run, storage)
    files = RunFiles(folder)
    step, steps = max((attempt.last or 0 for attempt in files.attempts), default=0), _steps(folder, files)
    lives = [life for name in folder.names("ranks/rank_") if name.endswith(".json") and (life := _json(folder, name))]
    last = max((life["time"] for life in lives), default=None)
    age_s = None if last is None else max(0.0, (now or time.time()) - last)
    history = lines(folder, HISTORY)
    restarts = [record for record in history if record["kind"] != END]
    pace = lines(folder, "ranks/pace.jsonl")[-1:]
    return Status(
        run=run,
        state=_state(step, steps, age_s, history, folder.read_text("log.txt") or ""),
        step=step,
        steps=steps,
        age_s=age_s,
        workers=next((attempt.header.get("world", 0) for attempt in reversed(files.attempts)), 0),
        restarts=len(restarts),
        checkpoints=len(checkpoint.complete(folder.at("checkpoints"))),
        reason=restarts[-1]["reason"] if restarts else "",
        waits=tuple(pace[0]["wait_share"]) if pace else (),
    )


def table(found: list[Status]) -> str:
    """For a terminal; of a single run also the last restart and the shares of waiting."""
    head = ("run", "state", "step", "age", "workers", "restarts", "checkpoints")
    rows = [head, *(_row(one) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(found) == 1:
        one = found[0]
        text += [f"last restart: {one.reason}"] if one.reason else []
        text += ["waiting for data: " + ", ".join(f"rank {rank} {100 * wait:.0f} %" for rank, wait in enumerate(
            one.waits))] if one.waits else []  # fmt: skip
    return "\n".join(text)


def lines(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """The records of a growing file; a last line that a kill cut is left out."""
    found = []
    for line in (folder.read_text(name) or "").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _row(one: Status) -> tuple[str, ...]:
    of = f" of {one.steps:,}" if one.steps else ""
    age = "" if one.age_s is None else duration(one.age_s)
    return one.run, one.state, f"{one.step:,}{of}", age, *map(str, (one.workers, one.restarts, one.checkpoints))


def _steps(folder: RunFolder, files: RunFiles) -> int:
    config, manifest = saved_config(folder), files.environment.get("manifest", {})
    return clock_of(config, manifest["rows"]).total_steps if config and "rows" in manifest else 0


def _state(step: int, steps: int, age_s: float | None, history: list[dict[str, Any]], log: str) -> str:
    said = log.splitlines()[-1:]
    if steps and step >= steps:
        return "complete"
    if history and history[-1]["kind"] == END:
        return str(history[-1]["reason"])
    if age_s is None:
        return "not begun"
    if not history and said and " stopped after step " in said[0]:  # a run without Ray
        return "stopped"
    return "running" if age_s < SILENT_S else "silent"


def _json(folder: RunFolder, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(folder.read_text(name) or "null")
    except json.JSONDecodeError:  # being written
        return None
