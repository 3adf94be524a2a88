"""How runs stand, from their files alone: local or on object storage, whoever and wherever the driver is."""

import time
from typing import Any, NamedTuple

from cluster.train.watch.restart_policy import END, HISTORY
from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.progress import duration
from training import checkpoint
from training.config.continuation import saved_config
from training.config.run_config import RunConfig
from training.config.run_plan import steps_of
from training.core.run_folder import starting
from training.core.run_folder.append_files import FLUSH_S
from training.core.run_folder.run_folder import RunFolder
from training.core.run_folder.starting import Starting
from training.report.run_files import RunFiles

CONFIG = "config.toml"
MARKS = (CONFIG, starting.NAME)
"""Names of files that only a run folder has."""
SILENT_S = 3 * FLUSH_S
"""Seconds without a sign of life after which nobody is at work on a run."""


class Status(NamedTuple):
    """One run."""

    run: str
    state: str
    """complete, running, starting, waiting (for machines), stopped, failed, silent (ended without a word), or not
    begun."""
    step: int
    steps: int
    """Steps of the whole run; 0 where the size of the data set is not known yet."""
    age_s: float | None
    """Since its last sign of life; None without one."""
    workers: int
    restarts: int
    checkpoints: int
    reason: str
    """Reason of the last restart."""
    doing: str
    """While it starts or waits: what it is at, or waits for."""
    waits: tuple[float, ...]
    """For each rank the part of its time that it waited for data, as last logged."""


def statuses(place: str, storage: StorageConfig) -> list[Status]:
    """The status of the run folder `place`, or of every run below it. Raises DataError where there is none."""
    folder = RunFolder(place, storage)
    run_names = {above for name in folder.names("") for mark in MARKS if (above := _above(name, mark)) is not None}
    runs = [place] if "" in run_names else [f"{place.rstrip('/')}/{above}" for above in sorted(run_names)]
    if not runs:
        raise DataError("no run here", where=place, hint="give a run folder, or a folder of runs")
    return [status(run, storage) for run in runs]


def _above(name: str, mark: str) -> str | None:
    """The folder of a file, if the file is called so; empty at the top."""
    above, slash, own = name.rpartition("/")
    return above if own == mark else None


def status(run: str, storage: StorageConfig, *, now: float | None = None) -> Status:
    """The status of one run folder; `now`: seconds since 1970."""
    folder = RunFolder(run, storage)
    files = RunFiles(folder)
    step, steps = max((attempt.last or 0 for attempt in files.attempts), default=0), steps_of(folder)
    lives = [life for name in folder.names("ranks/rank_") if name.endswith(".json") and (life := _json(folder, name))]
    last = max((life["time"] for life in lives), default=None)
    age_s = None if last is None else max(0.0, (now or time.time()) - last)
    history = lines(folder, HISTORY)
    restarts = [record for record in history if record["kind"] != END]
    pace = lines(folder, "ranks/pace.jsonl")[-1:]
    start = _start(folder, last, history, now or time.time())
    return Status(
        run=run,
        state=("waiting" if start.waits else "starting")
        if start
        else _state(step, steps, age_s, history, folder.read_text("log.txt") or ""),
        doing=start.doing if start else "",
        step=step,
        steps=steps,
        age_s=age_s,
        workers=next((attempt.header.get("world", 0) for attempt in reversed(files.attempts)), 0),
        restarts=len(restarts),
        checkpoints=len(checkpoint.complete(folder.at("checkpoints"))),
        reason=restarts[-1]["reason"] if restarts else "",
        waits=tuple(pace[0]["wait_share"]) if pace else (),
    )


def _start(folder: RunFolder, last: float | None, history: list[dict[str, Any]], now: float) -> Starting | None:
    """What the run is at, if it is starting: said later than any rank's sign of life and any end, not long ago."""
    start = starting.read(folder)
    if start is None or start.time < max(last or 0.0, *(record["time"] for record in history), 0.0):
        return None
    config = saved_config(folder) or RunConfig()
    return start if now - start.time < config.cluster.start_timeout_s else None


def table(listed: list[Status]) -> str:
    """For a terminal: a line a run, what starting ones are at; of a single run also the last restart and the shares of
    waiting."""
    head = ("run", "state", "step", "age", "workers", "restarts", "checkpoints")
    rows = [head, *(_row(one) for one in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    text += [
        f"{one.run}: {'waits for room: ' if one.state == 'waiting' else ''}{one.doing}" for one in listed if one.doing
    ]
    if len(listed) == 1:
        one = listed[0]
        text += [f"last restart: {one.reason}"] if one.reason else []
        text += ["waiting for data: " + ", ".join(f"rank {rank} {100 * wait:.0f} %" for rank, wait in enumerate(
            one.waits))] if one.waits else []  # fmt: skip
    return "\n".join(text)


def lines(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """The records of a growing file; a last line that a kill cut is left out."""
    records = []
    for line in (folder.read_text(name) or "").splitlines():
        try:
            records.append(parse_record(line))
        except ValueError:
            continue
    return records


def _row(one: Status) -> tuple[str, ...]:
    of = f" of {one.steps:,}" if one.steps else ""
    age = "" if one.age_s is None else duration(one.age_s)
    return one.run, one.state, f"{one.step:,}{of}", age, *map(str, (one.workers, one.restarts, one.checkpoints))


def _state(step: int, steps: int, age_s: float | None, history: list[dict[str, Any]], log: str) -> str:
    last_line = log.splitlines()[-1:]
    if steps and step >= steps:
        return "complete"
    if history and history[-1]["kind"] == END:
        return str(history[-1]["reason"])
    if age_s is None:
        return "not begun"
    if not history and last_line and " stopped after step " in last_line[0]:  # a run without Ray
        return "stopped"
    return "running" if age_s < SILENT_S else "silent"


def _json(folder: RunFolder, name: str) -> dict[str, Any] | None:
    try:
        return parse_record(folder.read_text(name) or "null")
    except ValueError:  # being written, or not there
        return None
