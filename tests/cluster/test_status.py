"""How runs stand, from real run folders, local and on object storage."""

import json
import time
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.status import SILENT_S, status
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from tests.conftest import S3Server
from tests.end_to_end.test_resume import Pace
from tests.end_to_end.tiny import generated, recipe
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.run_folder import starting
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.trainer.pretrain import pretrain

HERE = StorageConfig()


def _note(folder: RunFolder, **record: object) -> None:
    folder.append("restarts.jsonl", json.dumps({"time": time.time(), "kind": "crash", "reason": "", **record}))


@pytest.mark.slow
def test_status__of_runs_in_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = generated(tmp_path)
    for name, stop_at in (("done", 0), ("begun", 4)):
        config = recipes.load(recipe(tmp_path, data, str(tmp_path / "runs" / name), epochs=2.0))
        pretrain(config, world=World(), host=Pace(stop_at) if stop_at else LocalHost())
    done, begun = (status(str(tmp_path / "runs" / name), HERE) for name in ("done", "begun"))
    assert (done.state, done.step, done.steps) == ("complete", 6, 6)
    assert (done.workers, done.restarts, done.checkpoints) == (1, 0, 2)
    assert (begun.state, begun.step, begun.steps) == ("stopped", 4, 6) and begun.age_s is not None and begun.age_s < 60

    folder = RunFolder(str(tmp_path / "runs" / "begun"), HERE)
    _note(folder, reason="rank 1 on b: its process died")
    now = time.time()
    assert status(folder.url, HERE, now=now).state == "running"
    assert status(folder.url, HERE, now=now + SILENT_S + 60).state == "silent"
    _note(folder, kind="end", reason="failed")
    found = status(folder.url, HERE)
    assert (found.state, found.restarts, found.reason) == ("failed", 1, "rank 1 on b: its process died")
    _note(folder, kind="driver", reason="the command was run again")
    assert status(folder.url, HERE, now=now).state == "running"

    capsys.readouterr()
    assert main(["status", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if str(tmp_path / "runs") in line]) == 2
    assert any("done" in line and "complete" in line and "6 of 6" in line for line in said)
    assert main(["status", folder.url]) == 0
    assert "last restart: the command was run again" in capsys.readouterr().out


def test_status__of_a_run_that_starts_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything else of a run is there, and between two groups of workers."""
    folder = RunFolder(str(tmp_path / "runs" / "one"), HERE)
    starting.note(folder, "starts Ray")
    found = status(folder.url, HERE)
    assert (found.state, found.doing, found.step) == ("starting", "starts Ray", 0)
    starting.note(folder, "2 of 1 GPU each are needed; the cluster has 1 GPU", waits=True)
    now = time.time()
    folder.write_json("ranks/rank_00.json", {"time": now - 60, "step": 3})
    _note(folder, kind="crash", reason="rank 1 died", time=now - 30)
    assert main(["status", str(tmp_path / "runs"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["state"] == "waiting" and told["doing"].startswith("2 of 1 GPU") and told["run"].endswith("/one")
    assert main(["status", str(tmp_path / "runs")]) == 0
    assert "waits for room: 2 of 1 GPU each" in capsys.readouterr().out

    assert status(folder.url, HERE, now=now + RunConfig().cluster.start_timeout_s + 1).state != "waiting"
    folder.write_json("ranks/rank_00.json", {"time": time.time() + 1, "step": 4})
    assert status(folder.url, HERE).state == "running"
    _note(folder, kind="end", reason="stopped", time=time.time() + 2)
    assert status(folder.url, HERE).state == "stopped"


@pytest.mark.slow
def test_status__on_object_storage(s3: S3Server) -> None:
    url = f"s3://{s3.bucket()}/runs"
    folder = RunFolder(f"{url}/one", s3.storage)
    folder.write("config.toml", recipes.to_toml(RunConfig()))
    folder.write_json("ranks/rank_00.json", {"time": time.time() - 5, "step": 3})
    folder.write("metrics/attempt_001.jsonl", '{"attempt": 1, "world": 4}\n{"step": 3}\n{"step": ')
    folder.write("ranks/pace.jsonl", '{"step": 1, "wait_share": [0.5, 0.25]}\n{"st')
    found = status(f"{url}/one", s3.storage)
    assert (found.state, found.step, found.workers, found.waits) == ("running", 3, 4, (0.5, 0.25))


def test_status__no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run here"):
        main(["status", str(tmp_path)])
