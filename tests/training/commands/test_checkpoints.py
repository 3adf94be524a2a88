"""python -m training checkpoints, on checkpoints of real runs' form."""

from pathlib import Path

import pytest
import torch

from datapipe.core.errors import DataError
from datapipe.storage import Store, open_store
from tests.training.checkpoint.toy import make_checkpoints, make_method, make_step, make_stepper, save, saved
from training.__main__ import main
from training.checkpoint import MARKER, complete, read_marker
from training.commands import checkpoints


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def store(run: str) -> Store:
    return open_store(run).at("checkpoints")


def _damage(store: Store, name: str) -> None:
    part = f"{name}/{read_marker(store, name).files[0].name}"
    content = store.read(part)
    store.replace(part, content[:-1] + bytes([content[-1] ^ 1]))


def test_list__one_line_each(run: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    saved(store, 10, 20)
    store.replace("step_0000030/rank_00000.bb-1.safetensors", b"half")
    assert main(["checkpoints", run]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = [[f"step_00000{step}", str(4 * step), "samples"] for step in (10, 20)]
    assert [line.split()[:3] for line in lines[:2]] == wanted
    assert "1 file  world 1" in lines[0]
    assert lines[2] == "step_0000030  not complete: being written, or left by a crash"


def test_list__nothing_there(run: str) -> None:
    with pytest.raises(DataError, match="no complete checkpoint"):
        main(["checkpoints", run])


def test_verify__names_the_damaged(run: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    saved(store, 10, 20)
    assert main(["checkpoints", run, "verify"]) == 0
    _damage(store, "step_0000010")
    assert main(["checkpoints", run, "verify"]) == 1
    assert main(["checkpoints", run, "verify", "step_0000020"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("step_0000010  DAMAGED: the checksum of a file is wrong")
    assert lines[3] == lines[4] == "step_0000020  good"


def test_list_and_verify__pass_over_what_a_run_prunes_beside_them(
    run: str, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(store, 10, 20)
    names = complete(store)
    store.delete_many([f"step_0000010/{MARKER}"])  # markers go first
    monkeypatch.setattr(checkpoints, "complete", lambda _: names)  # both were there when they were listed
    assert main(["checkpoints", run]) == 0
    assert main(["checkpoints", run, "verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step_0000020", "step_0000010", "step_0000010", "step_0000020"]
    assert "not complete" in lines[1] and "pruned by its run" in lines[2] and lines[3].endswith("good")
    assert main(["checkpoints", run, "verify", "step_0000010"]) == 1  # asked for by name, it is missed


def test_compare__equal_and_different(
    tmp_path: Path, run: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    stepper = make_stepper(make_method())
    make_step(stepper)
    save(make_checkpoints(store), 10, stepper)
    other = tmp_path / "other"
    save(make_checkpoints(open_store(str(other)).at("checkpoints")), 10, stepper)
    assert main(["checkpoints", run, "compare", "step_0000010", str(other)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
    with torch.no_grad():
        stepper.parameters["student.head.mlp_cls.0.bias"][3] += 0.5
    save(make_checkpoints(store), 20, stepper)
    folder = f"{run}/checkpoints/step_0000020"
    assert main(["checkpoints", run, "compare", "step_0000010", folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:16].strip(): line[16:].split() for line in lines[1:6]}
    assert rows.keys() == {"student", "teacher", "other state", "exp_avg", "exp_avg_sq"}
    assert rows["student"][2:] == ["1", "0.5", "model/student.head.mlp_cls.0.bias"]
    assert all(row[2:] == ["0", "0"] for part, row in rows.items() if part != "student")
    assert "step: 10 and 20" in lines and lines[-1] == "different"


def test_compare__another_optimizer_and_size(run: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_stepper(make_method()), make_stepper(make_method(width=16), optimizer="sgd")
    for step, stepper in ((10, one), (20, other)):
        make_step(stepper)
        save(make_checkpoints(store), step, stepper)
    assert main(["checkpoints", run, "compare", "step_0000010", "step_0000020"]) == 1
    output = capsys.readouterr().out
    assert "exp_avg/student.head.mlp_cls.0.bias: only in the first" in output
    assert "model/student.backbone.cls_token: (1, 1, 8) and (1, 1, 16)" in output


def test_compare__says_which_there_are(run: str, store: Store) -> None:
    saved(store, 10)
    with pytest.raises(DataError, match="complete ones here: step_0000010"):
        main(["checkpoints", run, "compare", "step_0000010", "step_0000011"])


def test_prune__keeps_the_newest_good_ones(run: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    saved(store, 20, 40, 60, 80)
    store.replace("step_0000070/rank_00000.bb-1.safetensors", b"half")
    _damage(store, "step_0000080")
    before = [entry.name for entry in store.list()]
    assert main(["checkpoints", run, "prune", "--keep-last", "1", "--dry-run"]) == 0
    assert [entry.name for entry in store.list()] == before
    assert main(["checkpoints", run, "prune", "--keep-last", "1"]) == 0
    assert complete(store) == ["step_0000060", "step_0000080"], "what is damaged and newest is left to be looked at"
    output = capsys.readouterr().out
    assert "would delete step_0000020" in output and "deleted step_0000040" in output
    assert "step_0000080  DAMAGED" in output


def test_prune__deletes_nothing_where_nothing_is_good(run: str, store: Store) -> None:
    saved(store, 20)
    _damage(store, "step_0000020")
    with pytest.raises(DataError, match="no checkpoint of the run is good"):
        main(["checkpoints", run, "prune", "--keep-last", "1"])
    assert complete(store) == ["step_0000020"]
