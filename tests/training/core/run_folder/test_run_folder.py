"""Files of a run that grow."""

import resource
from pathlib import Path

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from training.core.run_folder.run_folder import RunFolder


def test_run_folder__no_half_lines_on_a_full_disk(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), StorageConfig())
    folder.append("log.txt", "first")
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len("first\nsec"), allowed[1]))
    try:
        with pytest.raises(StorageError, match="No space left"):
            folder.append("log.txt", "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    folder.append("log.txt", "third")
    assert folder.read_text("log.txt") == "first\nthird\n"


def test_run_folder__is_tried_before_the_work_and_nothing_is_left(tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "new" / "run"), StorageConfig()).refuse_unwritable()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="Not a directory") as refused:
            RunFolder(str(place), StorageConfig()).refuse_unwritable()
        assert refused.value.where == str(tmp_path / "file")


def test_run_folder__on_a_full_disk_is_refused(tmp_path: Path) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, allowed[1]))
    try:
        with pytest.raises(StorageError, match="refused"):
            RunFolder(str(tmp_path), StorageConfig()).refuse_unwritable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert list(tmp_path.iterdir()) == []
