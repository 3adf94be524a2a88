"""Ray Train with real workers: one is killed, training goes on, and the weights are those of the undisturbed run."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.flow.test_resume import _until
from tests.flow.tiny import audited, command, final_state, finished, recipe, shards
from tests.ranks import run_ranks

Write = Callable[..., dict[str, bytes]]


def _kill_at(step: int, run: Path, killed: list[int]) -> None:
    """SIGKILL the worker of rank 1 once its audit log tells of this step."""
    log = run / "ranks" / "audit_01.jsonl"
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if log.exists() and f'"step": {step},' in log.read_text():
            killed.append(json.loads((run / "ranks" / "rank_01.json").read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.02)  # nobody else writes this file: there is no event to wait for


@pytest.mark.slow
def test_pretrain_job__a_killed_worker_changes_nothing(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 50)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = recipe(tmp_path, data.url, str(tmp_path / "run"), epochs=2.0)
    run, undisturbed, killed = tmp_path / "run", tmp_path / "undisturbed", []  # type: ignore[var-annotated]
    flags = ("--cluster.max-workers", "2", "--engine.stepper", "deepspeed")
    process = command("cluster", "pretrain", str(path), *flags)
    killer = threading.Thread(target=_kill_at, args=(7, run, killed))
    killer.start()
    code, output, errors = finished(process)
    killer.join()
    assert killed and code == 0, output + errors
    attempts = [json.loads(log.read_text().splitlines()[0]) for log in sorted((run / "metrics").glob("*.jsonl"))]
    assert [attempt["resumed_from"] for attempt in attempts] == [None, "step_0000006"]
    assert re.fullmatch(r"restarted: rank 1 on 127.0.0.1 \(node \w{8}\): its process died", attempts[1]["reason"])
    (restart,) = map(json.loads, (run / "restarts.jsonl").read_text().splitlines())
    assert (restart["kind"], restart["rank"], restart["saved"]) == ("crash", 1, 6) and restart["step"] >= 6
    run_ranks(2, _until, str(path), str(undisturbed), "deepspeed", 0)
    before, after = final_state(undisturbed), final_state(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert audited(run) == audited(undisturbed)


@pytest.mark.slow
def test_pretrain_job__sigterm_saves_and_says_how_to_go_on(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 50)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    path = recipe(tmp_path, data.url, str(tmp_path / "run"), epochs=2000.0)
    process = command("cluster", "pretrain", str(path), "--checkpoints.every-steps", "100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    code, output, errors = finished(process)
    assert code == 75, output + errors
    assert "go on with: python -m cluster pretrain" in output
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/checkpoint.json"))


@pytest.mark.slow
def test_pretrain_job__a_clear_mistake_inside_a_worker_is_not_retried(tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"), each=9)
    (tmp_path / "shards" / data.shards[1].name).unlink()
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    code, _, errors = finished(command("cluster", "pretrain", str(path)))
    assert code == 1
    assert Path(data.shards[1].name).name in errors and "Traceback" not in errors
