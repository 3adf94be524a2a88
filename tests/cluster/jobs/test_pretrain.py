"""Ray Train with real workers: one is killed, training goes on, and the weights are those of the undisturbed run."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cluster.forking.server import TITLE as FORKSERVER
from cluster.train.standby import TITLE
from datapipe.core import cli as ends
from tests.end_to_end.pause import PATIENCE_S, Pause
from tests.end_to_end.test_resume import _until
from tests.end_to_end.tiny import audited, command, final_state, finished, recipe, shards
from tests.support.ranks import run_ranks
from tests.support.warm_python import descendants
from training.__main__ import main
from training.checkpoint import step_of
from training.core.run_folder import crash_log

KILLED_AFTER = 8
"""Steps, of 16; a checkpoint is saved after every third."""
Write = Callable[..., dict[str, bytes]]


def standing_by(command: int, count: int) -> set[int]:
    """The processes below a command that stand by, once there are so many and they are done with what they import."""
    end = time.monotonic() + PATIENCE_S
    while True:
        found = set()
        for process in descendants(command):
            with contextlib.suppress(psutil.Error):
                name = "".join(process.cmdline()[:1])  # of one that has just ended nothing
                if name.startswith(TITLE) and process.status() == psutil.STATUS_SLEEPING:
                    found.add(process.pid)
        if len(found) == count:
            return found
        assert time.monotonic() < end, "no workers stand by"
        time.sleep(0.1)


@pytest.mark.slow
def test_pretrain_job__a_killed_worker_changes_nothing(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 50)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = recipe(tmp_path, data.url, str(tmp_path / "run"), epochs=2.0)
    run, undisturbed, pause = tmp_path / "run", tmp_path / "undisturbed", Pause(tmp_path, KILLED_AFTER, rank=1)
    flags = (
        "--cluster.max-workers",
        "2",
        "--cluster.standby",
        "True",
        "--engine.stepper",
        "deepspeed",
        "--cluster.environment",
    )
    process = command("cluster", "pretrain", str(path), *flags, *pause.worker_environment, **pause.environment)
    killed = pause.reached(process)
    standing = standing_by(process.own_pid, 2)
    (server,) = {psutil.Process(pid).ppid() for pid in (killed, *standing)}
    assert psutil.Process(server).cmdline()[0].startswith(FORKSERVER), "a process of its machine forked them"
    struck = time.time()
    os.kill(killed, signal.SIGKILL)
    pause.end()
    code, output, errors = finished(process)
    assert code == 0, output + errors
    assert not any(map(psutil.pid_exists, (server, *standing))), "they end with the command"
    attempts = [json.loads(log.read_text().splitlines()[0]) for log in sorted((run / "metrics").glob("*.jsonl"))]
    assert attempts[1]["startup"]["process"] < struck < attempts[1]["startup"]["imported"]  # it stood by
    assert re.fullmatch(r"restarted: rank 1 on 127.0.0.1 \(node \w{8}\): its process died", attempts[1]["reason"])
    records = map(json.loads, (run / "restarts.jsonl").read_text().splitlines())
    (restart,) = (record for record in records if record["kind"] == "crash")
    first, second = (attempt["resumed_from"] for attempt in attempts)
    resumed = step_of(second) or 0
    assert first is None and 0 < resumed <= KILLED_AFTER
    assert restart["rank"] == 1
    assert restart["saved"] <= min(restart["step"], resumed)  # the last one may not have been told of
    run_ranks(2, _until, str(path), str(undisturbed), "deepspeed", 0)
    before, after = final_state(undisturbed), final_state(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert audited(run) == audited(undisturbed)


@pytest.mark.slow
def test_pretrain_job__the_last_words_of_a_dying_worker_are_in_the_history(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path, run = recipe(tmp_path, data.url, str(tmp_path / "run")), tmp_path / "run"
    pause = Pause(tmp_path, 2, rank=1)
    flags = ("--cluster.max-workers", "2", "--cluster.environment", *pause.worker_environment)
    process = command("cluster", "pretrain", str(path), *flags, **pause.environment)
    killed = pause.reached(process)
    os.kill(killed, signal.SIGABRT)
    pause.end()
    code, output, errors = finished(process)
    assert code == 0, output + errors
    words = "its last words: Fatal Python error: Aborted"  # faulthandler's, in C
    records = map(json.loads, (run / "restarts.jsonl").read_text().splitlines())
    (restart,) = (record for record in records if record["kind"] == "crash")
    assert restart["rank"] == 1 and words in restart["reason"] and words in output
    assert words in (run / "log.txt").read_text()
    kept = crash_log.of_process((run / "ranks" / "rank_01.log").read_text(), killed)
    assert kept is not None and any("most recent call first" in line for line in kept)


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["SIGTERM", "notice"])
def test_pretrain_job__saves_and_says_how_to_go_on(
    tmp_path: Path, write_crops: Write, told_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ports of an embedded Ray and of its workers are on loopback, meanwhile, and no other run gets its folder."""
    write_crops(tmp_path / "crops", 50)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = recipe(tmp_path, data.url, str(tmp_path / "run"), epochs=2000.0)
    process = command("cluster", "pretrain", str(path), "--checkpoints.every-steps", "100000", "--cluster.max-workers",
                      "2", "--cluster.notice", str(tmp_path / "going"), "--cluster.notice-every-s", "0.2")  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    listening = _listening(process.pid)
    open_to_all = [place for place in listening if place[0] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]
    assert len(listening) > 5 and not open_to_all, listening
    assert ends.run(main, ["pretrain", str(path)]) == ends.FAILED
    assert f"another process writes to this run folder: process {process.own_pid} on" in capsys.readouterr().err
    if told_by == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        (tmp_path / "going").write_text("at noon")
    code, output, errors = finished(process)
    assert code == 75, output + errors
    assert "go on with: python -m cluster pretrain" in output
    assert told_by == "SIGTERM" or "will be taken away (at noon)" in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/checkpoint.json"))


def _listening(root: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process or any below it takes connections."""
    found = set()
    for process in [psutil.Process(root), *descendants(root)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("inet")
            found |= {(one.laddr.ip, one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_pretrain_job__a_clear_mistake_inside_a_worker_is_not_retried(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"), each=9)
    (tmp_path / "shards" / data.shards[1].name).unlink()
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    code, _, errors = finished(command("cluster", "pretrain", str(path)))
    assert code == 1
    assert Path(data.shards[1].name).name in errors and "Traceback" not in errors
