"""What TensorBoard shows of a run, read by its own reader: tags in groups, on disks and on object storage."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datapipe.core.config import StorageConfig
from tests.conftest import S3Server
from training.core.run_folder.run_folder import RunFolder
from training.trainer.monitoring import tensorboard
from training.trainer.monitoring.tensorboard import EventWriter, tag_of

LINE = {"loss": 2.5, "loss_cls": 1.5, "lr": 1e-3, "images_per_s": 812.0, "grad_norm": 3.0, "entropy": 0.5, "time": 1.0,
        "bottleneck": "views", "mfu": 0.3}  # fmt: skip
TAGS = ["health/entropy", "health/grad_norm", "loss/cls", "loss/total", "schedule/lr", "speed/images_per_s",
        "speed/mfu"]  # fmt: skip


def written(folder: RunFolder, steps: int) -> None:
    writer = EventWriter(folder, total_steps=steps)
    for step in range(1, steps + 1):
        writer.step({**LINE, "step": step})
    writer.add("score/people mAP", 0.25, steps)
    writer.close()
    folder.flush()


def shown(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_board__in_a_local_run_folder(tmp_path: Path) -> None:
    written(RunFolder(str(tmp_path / "run"), StorageConfig()), 3)
    found = shown(tmp_path / "run" / "tensorboard")
    assert sorted(found.Tags()["scalars"]) == sorted([*TAGS, "score/people mAP"])
    assert [(one.step, one.value) for one in found.Scalars("loss/total")] == [(1, 2.5), (2, 2.5), (3, 2.5)]


def test_board__on_object_storage_with_so_many_points(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "MOST_POINTS", 5)
    folder = RunFolder(f"s3://{s3.bucket()}/run", s3.storage)
    written(folder, 20)
    names = list(folder.names("tensorboard/"))
    assert len(names) == 1
    (tmp_path / "copy").mkdir()
    (tmp_path / names[0]).parent.mkdir()
    (tmp_path / names[0]).write_bytes(folder.store.read(names[0]))
    found = shown(tmp_path / "tensorboard")
    assert [one.step for one in found.Scalars("loss/cls")] == [4, 8, 12, 16, 20]
    assert found.Scalars("score/people mAP")[0].value == 0.25


def test_tag_of__every_number_is_in_a_group() -> None:
    assert sorted(map(tag_of, (name for name in LINE if name not in tensorboard.NO_CURVES))) == TAGS
