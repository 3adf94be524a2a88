"""Checkpoints that are not the run's own: copies under another name, and those of a writer that had been replaced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from datapipe.core.errors import DataError, LeaseError
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.training.checkpoint.toy import make_checkpoints, make_method, make_stepper, save, saved
from training.checkpoint import MARKER, Checkpoints, complete, lineage, newest_good, read_marker
from training.commands.entry_points import checkpoints as command
from training.core.host import lines_to
from training.core.run_folder.write_guard import WriteGuard


class Term(WriteGuard):
    """Of a writer that knows its term and has not heard of another one, or has just heard."""

    def __init__(self, term: int) -> None:
        self.term = term
        self.over = False

    @property
    def lost(self) -> LeaseError | None:
        return LeaseError("taken over") if self.over else None

    def check(self) -> None:
        if self.lost:
            raise self.lost

    confirm = check


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "run" / "checkpoints"))
    server: S3Server = request.getfixturevalue("s3")
    return open_store(f"s3://{server.bucket()}/run/checkpoints", server.storage)


def _writer(store: Store, term: int, said: list[str] | None = None, **config: Any) -> Checkpoints:
    """A writer of this term, which has restored what there was."""
    made = make_checkpoints(store, guard=Term(term), **config)
    with lines_to((said if said is not None else []).append):
        made.restore(make_stepper(make_method()))
    return made


def _save(writer: Checkpoints, *steps: int) -> None:
    for step in steps:
        save(writer, step, make_stepper(make_method(seed=step)))


def _copy(store: Store, name: str, copy: str) -> None:
    for entry in list(store.list(f"{name}/")):
        store.replace(f"{copy}/{entry.name.partition('/')[2]}", store.read(entry.name))


def test_copy__is_no_checkpoint_and_said_to_be_none(store: Store) -> None:
    saved(store, 10, 20)
    _copy(store, "step_0000020", "step_9999999")
    said: list[str] = []
    assert complete(store, said.append) == ["step_0000010", "step_0000020"]
    assert len(said) == 1 and "step_9999999 is passed over: it is a copy or was renamed" in said[0]
    assert "that of step 20" in said[0]
    said.clear()
    with lines_to(said.append):
        assert make_checkpoints(store).restore(make_stepper(make_method())) == (80, "step_0000020")
    assert len(said) == 1 and "step_9999999 is passed over" in said[0]
    found = newest_good(store, said.append)
    assert found is not None and found[0] == "step_0000020"
    with pytest.raises(DataError, match="a copy of a checkpoint, or was renamed: its marker is that of step 20"):
        read_marker(store, "step_9999999")


@pytest.mark.slow
def test_copy__counts_for_nothing_when_old_ones_are_deleted(store: Store) -> None:
    """Two stay. Copies are neither of them, and not deleted."""
    saved(store, 10, 30)
    _copy(store, "step_0000010", "step_0000033")
    _copy(store, "step_0000010", "step_0000005")
    copies = [entry for entry in store.list() if entry.name.startswith(("step_0000033/", "step_0000005/"))]
    writer = make_checkpoints(store, keep_every_steps=0)
    _save(writer, 40)
    assert complete(store, lambda _: None) == ["step_0000030", "step_0000040"]
    assert [entry for entry in store.list() if entry in copies] == copies
    _save(writer, 50)
    assert complete(store, lambda _: None) == ["step_0000040", "step_0000050"]
    assert [entry for entry in store.list() if entry in copies] == copies


def test_copy__in_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    saved(open_store(str(folder)), 10, 20, 30)
    shutil.copytree(folder / "step_0000020", folder / "step_0000025")
    assert command([str(tmp_path / "run"), "prune", "--keep-last", "1"]) == 0
    assert "step_0000025" not in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["step_0000025", "step_0000030"]
    assert command([str(tmp_path / "run")]) == 0
    assert "step_0000025" not in capsys.readouterr().out
    assert command([str(tmp_path / "run"), "verify", "step_0000025"]) == 1
    assert "DAMAGED: this is a copy" in capsys.readouterr().out


@pytest.mark.slow
def test_term__what_was_saved_beyond_its_successors_beginning_is_passed_over(store: Store) -> None:
    """The first writer was stopped after step 20, and did not hear of the second."""
    first = _writer(store, 1)
    _save(first, 10, 20)
    second = _writer(store, 2)
    _save(first, 30, 40)
    said: list[str] = []
    assert complete(store, said.append) == ["step_0000010", "step_0000020"]
    assert len(said) == 2 and "step_0000040 is passed over: it was saved under term 1 of the run's lease" in said[1]
    assert "taken over at step 20" in said[1]
    third = make_checkpoints(store, guard=Term(3))
    assert third.restore(make_stepper(make_method())) == (80, "step_0000020")
    _save(second, 30)
    assert read_marker(store, "step_0000030").term == 2, "in place of the first one's"
    assert complete(store, said.append) == ["step_0000010", "step_0000020"], "the third began at step 20, too"


@pytest.mark.slow
def test_term__a_late_writer_deletes_nothing_of_its_successor(store: Store) -> None:
    first = _writer(store, 1, keep_every_steps=0)
    _save(first, 10, 20)
    second = _writer(store, 2, keep_every_steps=0)
    store.replace("step_0000050/rank_00000.t2-aaaa-1.safetensors", b"being written")
    _save(second, 30, 40)
    _save(first, 60)
    assert complete(store, lambda _: None) == ["step_0000030", "step_0000040"]
    names = {entry.name for entry in store.list()}
    assert "step_0000050/rank_00000.t2-aaaa-1.safetensors" in names and f"step_0000060/{MARKER}" in names


def test_term__a_marker_of_a_later_one_is_not_replaced(store: Store) -> None:
    first = _writer(store, 1, max_failed_saves=1)
    second = _writer(store, 2)
    _save(second, 10)
    with pytest.raises(Exception, match="there already, of a later term"):
        _save(first, 10)
    assert read_marker(store, "step_0000010").term == 2


def test_term__whoever_hears_of_its_successor_ends(store: Store) -> None:
    guard = Term(1)
    writer = make_checkpoints(store, guard=guard)
    writer.restore(make_stepper(make_method()))
    guard.over = True
    with pytest.raises(LeaseError):
        _save(writer, 10)
    assert complete(store) == []


def test_begin__keeps_what_still_matters(store: Store) -> None:
    for term, step in ((1, 0), (2, 0), (4, 30), (5, 50), (6, 50), (9, 40)):
        lineage.begin(store, term, step)
        lineage.begin(store, term, step + 7)  # workers that were started anew under the same term
    assert json.loads(store.read("term_0000009.json")) == {"terms": [[2, 0], [4, 30], [9, 40]]}
    made = make_checkpoints(store, guard=Term(9))
    _save(made, 60)
    assert [entry.name for entry in store.list("term_")] == ["term_0000009.json"]


def test_marker__without_a_term_is_what_it_was(store: Store) -> None:
    """Checksums of before stay, which scores and exports go by; a run with a lease goes on from there."""
    saved(store, 10)
    content = json.loads(store.read(f"step_0000010/{MARKER}"))
    assert "term" not in content and content["sha256"] == read_marker(store, "step_0000010").sha256
    later = _writer(store, 3)
    _save(later, 20)
    assert read_marker(store, "step_0000020").term == 3
    assert store.read(f"step_0000020/{MARKER}").startswith(b'{"step":20,"term":3,')
    assert complete(store, pytest.fail) == ["step_0000010", "step_0000020"]
