"""Files of a run that grow."""

import resource
from pathlib import Path

import pytest

from datapipe.config import StorageConfig
from datapipe.errors import StorageError
from training.run_folder import RunFolder


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
