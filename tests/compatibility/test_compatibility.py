"""What an earlier version wrote goes on: a data set and a run that was stopped on its way (`make.py` says how made)."""

import json
import shutil
from pathlib import Path

import pytest

from datapipe.__main__ import main as data
from tests.compatibility.make import STEPS, STOP
from tests.end_to_end.tiny import audited, step_records
from training.__main__ import main

WRITTEN = Path(__file__).parent / "written"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A copy, as both go on in place."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


@pytest.mark.slow
def test_run__goes_on_with_the_losses_that_it_would_have_had(written: Path) -> None:
    run = written / "run"
    before = step_records(run)
    assert main(["pretrain", str(run / "config.toml"), "--out", str(run),
                 "--stream.manifest", str(written / "shards")]) == 0  # fmt: skip
    later = step_records(run, attempt=2)
    assert [record["step"] for record in (*before, *later)] == [*range(1, STEPS + 1)] and len(before) == STOP
    undisturbed = json.loads((written / "undisturbed.json").read_text())
    found = {str(record["step"]): record["loss"] for record in (*before, *later)}
    assert found == pytest.approx(undisturbed, rel=1e-4, abs=1e-6)  # another processor rounds otherwise
    assert sorted(audited(run)) == [*range(1, STEPS + 1)]
    for words in (["checkpoints", str(run), "verify"], ["report", str(run)], ["export", str(run)]):
        assert main(words) == 0


def test_data_set__is_whole_and_can_be_changed(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, crops = str(written / "shards"), written / "crops.txt"
    crops.write_text("0001_c1s1_000002_00.jpg\n")
    for words in (["verify", shards], ["remove", shards, "--names", str(crops)], ["verify", shards]):
        assert data([*words, "--workers", "1"]) == 0, capsys.readouterr()
