"""What Ray Train is told of a run, and what it leaves behind of a hang, in Ray's own classes; no cluster is started."""

import dataclasses
from pathlib import Path

import pytest
from ray.train import FailureConfig

from cluster.core.ray_internals import NCCL_EVIDENCE, lean_trainer, watch_nccl
from cluster.train.trainer_setup import SURVIVORS_S, _without_end
from cluster.train.watch.hang_evidence import FOLDER, keep_evidence
from datapipe.core.config import StorageConfig
from training.core.run_folder.run_folder import RunFolder


def test_failure_config__is_without_end_and_gives_survivors_time() -> None:
    found = dataclasses.asdict(_without_end())
    assert (found["max_failures"], found["controller_failure_limit"], found["max_preemption_failures"]) == (-1, -1, -1)
    known = {field.name for field in dataclasses.fields(FailureConfig)}
    assert "preemption_grace_s" not in known or found["preemption_grace_s"] == SURVIVORS_S


def test_nccl_watch__is_among_ray_trains_callbacks_and_only_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of its class, which is private; Ray 2.59 has none."""
    nccl = pytest.importorskip("ray.train.v2._internal.callbacks.nccl_ras")
    for name in ("ENABLE_NCCL_HANG_DETECTOR", "NCCL_RAS_ACTION", "NCCL_RAS_CONFIRM_DURATION_S",
                 "NCCL_RAS_MIN_POLL_INTERVAL_S"):  # fmt: skip
        monkeypatch.setenv(f"RAY_TRAIN_{name}", "")
        monkeypatch.delenv(f"RAY_TRAIN_{name}")
    callbacks = lean_trainer()(print)._create_default_callbacks()
    assert not [one for one in callbacks if isinstance(one, nccl.NCCLRASCallback)]
    watch_nccl(90)
    callbacks = lean_trainer()(print)._create_default_callbacks()
    (watch,) = (one for one in callbacks if isinstance(one, nccl.NCCLRASCallback))
    assert (watch._action, watch._confirm_duration_s, watch._poll_interval_s) == ("observe", 90, 15)
    assert nccl.HANG_DETECTOR_DIRNAME == NCCL_EVIDENCE
    assert not [one for one in callbacks if "PlacementGroupCleaner" in type(one).__name__]


def test_evidence_of_a_hang__is_kept_in_the_run_folder(tmp_path: Path) -> None:
    found = tmp_path / "scratch" / "run-0123" / NCCL_EVIDENCE
    for name in ("stack_traces/rank_0.log", "nccl_ras/ncclras_report.txt"):
        (found / name).parent.mkdir(parents=True)
        (found / name).write_text(name)
    folder = RunFolder(str(tmp_path / "run"), StorageConfig())
    kept = keep_evidence(str(tmp_path / "scratch"), folder)
    assert kept == [f"{FOLDER}/nccl_ras/ncclras_report.txt", f"{FOLDER}/stack_traces/rank_0.log"]
    assert folder.read_text(kept[1]) == "stack_traces/rank_0.log"
    assert keep_evidence(str(tmp_path / "scratch"), folder) == []
