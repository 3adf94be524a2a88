import json
import resource
from collections import Counter
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from tests.training.checkpoint.toy import (
    make_checkpoints,
    make_method,
    make_step,
    make_stepper,
    same,
    save,
    saved,
    tensors,
)
from training.checkpoint import MARKER, complete, newest_good, read_marker, reader, verify
from training.core.host import lines_to
from training.core.world import World
from training.engine.loss_scaling import LossScale


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "checkpoints"))
    server: S3Server = request.getfixturevalue("s3")
    return open_store(f"s3://{server.bucket()}/run/checkpoints", server.storage)


def _part(store: Store, name: str) -> str:
    return f"{name}/{read_marker(store, name).files[0].name}"


def test_restore__gives_back_every_tensor_and_the_position(store: Store) -> None:
    before = saved(store, 10)[10]
    after = make_method(seed=99)
    assert not same(before.state_dict(), after.state_dict())
    assert make_checkpoints(store).restore(make_stepper(after)) == (40, "step_0000010")
    assert same(before.state_dict(), after.state_dict())


def test_restore__the_loss_scale_where_a_checkpoint_has_one(store: Store) -> None:
    scaled = make_stepper(make_method())
    scaled.scale = LossScale(2.0**13, 77)
    save(make_checkpoints(store), 10, scaled)
    stepper = make_stepper(make_method(), precision="fp16")
    make_checkpoints(store).restore(stepper)
    assert stepper.scale == LossScale(2.0**13, 77)
    save(make_checkpoints(store), 20, make_stepper(make_method()))
    make_checkpoints(store).restore(stepper)
    assert stepper.scale == LossScale()


def test_restore__nothing_there(store: Store) -> None:
    assert make_checkpoints(store).restore(make_stepper(make_method())) == (0, None)


@pytest.mark.parametrize("block", ["one byte less", "as it is", "one byte more", "parts"])
def test_verify__at_the_edges_of_what_is_read_at_a_time(
    store: Store, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(store, 10)
    files = read_marker(store, "step_0000010").files
    size = files[0].bytes
    monkeypatch.setattr(reader, "BLOCK", {"one byte less": size - 1, "as it is": size, "one byte more": size + 1,
                                          "parts": size // 7}[block])  # fmt: skip
    verify(store, "step_0000010", files)
    part = _part(store, "step_0000010")
    store.replace(part, store.read(part) + b" ")
    with pytest.raises(DataError, match=f"has {size + 1:,} bytes, should have {size:,}"):
        verify(store, "step_0000010", files)


@pytest.mark.slow
def test_restore__asks_an_object_store_for_several_blocks_at_a_time(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK", 1 << 10)
    together, asked = Barrier(reader.IN_FLIGHT), Counter[str]()

    def before(method: str, path: str) -> None:
        asked[method] += 1
        if (method, path[-12:]) == ("GET", ".safetensors") and asked["in turn"] < reader.IN_FLIGHT:
            asked["in turn"] += 1
            together.wait(300)  # broken unless so many are under way at the same time

    direct = open_store(f"s3://{s3.bucket()}", s3.storage)
    wanted = saved(direct, 10)[10]
    method = make_method(seed=99)
    with FaultyProxy(s3.endpoint, before=before) as proxy:
        through = open_store(direct.url, StorageConfig(endpoint_url=proxy.endpoint, attempts=1))
        assert make_checkpoints(through).restore(make_stepper(method)) == (40, "step_0000010")
        assert same(method.state_dict(), wanted.state_dict()) and asked["HEAD"] == 0
        before_small = asked["GET"]
        monkeypatch.undo()
        # its list, its marker's beginning, its marker, its file, and not its size
        assert newest_good(through, print) is not None
        assert asked["GET"] == before_small + 4 and asked["HEAD"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut", "no marker", "broken marker", "changed marker", "no part"])
def test_restore__a_damaged_checkpoint_is_passed_over_with_a_warning(store: Store, damage: str) -> None:
    methods = saved(store, 10, 20)
    part, marker = _part(store, "step_0000020"), f"step_0000020/{MARKER}"
    content = store.read(part)
    if damage == "flip":
        store.replace(part, content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut":
        store.replace(part, content[: len(content) // 2])
    elif damage == "broken marker":
        store.replace(marker, b"{")
    elif damage == "changed marker":
        store.replace(marker, store.read(marker).replace(b'"samples":80', b'"samples":81'))
    else:
        store.delete(marker if damage == "no marker" else part)
    said: list[str] = []
    method = make_method(seed=99)
    with lines_to(said.append):
        assert make_checkpoints(store).restore(make_stepper(method)) == (40, "step_0000010")
    assert same(method.state_dict(), methods[10].state_dict())
    assert (damage == "no marker") == (not said)  # without its marker it never existed
    assert all("step_0000020 is passed over" in line for line in said)


def test_restore__a_checkpoint_of_other_data_is_refused(store: Store) -> None:
    saved(store, 10)
    stepper = make_stepper(make_method())
    other = {"manifest": "b" * 64}
    after_a_removal = make_checkpoints(store, about=other)
    after_a_removal.replaces = ("c" * 64, "a" * 64)
    assert after_a_removal.restore(stepper)[0] > 0
    with pytest.raises(DataError, match=r"other data: manifest aaaaaaaaaaaa \(100 crops\), now bbbbbbbbbbbb"):
        make_checkpoints(store, about=other).restore(stepper)


def test_restore__another_model_is_refused_by_name(store: Store) -> None:
    saved(store, 10)
    with pytest.raises(DataError, match="student.backbone.blocks.0.attn.proj.weight"):
        make_checkpoints(store).restore(make_stepper(make_method(width=16)))


def test_restore__another_optimizer_is_refused_by_name(store: Store) -> None:
    stepper = make_stepper(make_method())
    make_step(stepper)
    save(make_checkpoints(store), 10, stepper)
    with pytest.raises(DataError, match="it has nothing for momentum_buffer/student"):
        make_checkpoints(store).restore(make_stepper(make_method(), optimizer="sgd"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_restore__the_optimizer_goes_on_as_if_nothing_had_been(store: Store, optimizer: str) -> None:
    """In the memory that it has already, too: after steps that are to be forgotten."""
    stepper = make_stepper(make_method(), optimizer=optimizer)
    make_step(stepper, 1)
    save(make_checkpoints(store), 10, stepper)
    make_step(stepper, 2)
    fresh = make_stepper(make_method(seed=5), optimizer=optimizer)
    for later in (fresh, stepper):
        make_checkpoints(store).restore(later)
        make_step(later, 3)
    assert same(fresh.method.state_dict(), stepper.method.state_dict())
    undisturbed = make_stepper(make_method(), optimizer=optimizer)
    make_step(undisturbed, 1)
    make_step(undisturbed, 3)
    assert same(fresh.method.state_dict(), undisturbed.method.state_dict())
    assert fresh.steps() == undisturbed.steps() and len(fresh.steps()) == len(fresh.names)


def test_restore__before_the_first_step(store: Store) -> None:
    """What had not begun when it was saved begins anew."""
    save(make_checkpoints(store), 10, make_stepper(make_method()))
    stepper = make_stepper(make_method())
    make_step(stepper, 1)
    make_checkpoints(store).restore(stepper)
    assert stepper.steps() == {}
    make_step(stepper, 2)
    other = make_stepper(make_method())
    make_step(other, 2)
    assert same(stepper.method.state_dict(), other.method.state_dict())


@pytest.mark.slow
def test_save__keeps_the_last_and_those_for_evaluation(store: Store) -> None:
    saved(store, 10, 20, 30, 40, 50, 60, 70)
    assert complete(store) == [f"step_{step:07d}" for step in (20, 40, 60, 70)]
    left = [entry.name for entry in store.list()]
    assert len(left) == 2 * 4, "a part and a marker each"


def test_save__sweeps_what_was_never_finished(store: Store) -> None:
    for left in ("step_0000005/rank_00000.aa-1.safetensors", "step_0000010/rank_00001.bb-7.json"):
        store.replace(left, b"half")
    store.replace("step_0000030/rank_00000.bb-8.safetensors", b"maybe somebody is at it")
    saved(store, 10)
    names = {entry.name for entry in store.list()}
    assert {name.partition("/")[0] for name in names} == {"step_0000010", "step_0000030"}
    assert len(names) == 3


@pytest.mark.slow
def test_save__over_a_damaged_checkpoint_of_the_same_step(store: Store) -> None:
    saved(store, 10, 20)
    store.replace(_part(store, "step_0000020"), b"short")
    checkpoints = make_checkpoints(store)
    stepper = make_stepper(make_method(seed=99))
    assert checkpoints.restore(stepper) == (40, "step_0000010")
    save(checkpoints, 20, stepper)
    verify(store, "step_0000020", read_marker(store, "step_0000020").files)
    assert complete(store) == ["step_0000010", "step_0000020"]


@pytest.mark.slow
def test_save__what_the_state_was_not_what_it_becomes(store: Store) -> None:
    """The loop goes on while the checkpoint is written."""
    stepper = make_stepper(make_method())
    make_step(stepper, 1)
    before = {name: value.clone() for name, value in stepper.method.state_dict().items()}
    checkpoints = make_checkpoints(store)
    checkpoints.save(10, 40, stepper)
    make_step(stepper, 2)
    checkpoints.finish()
    held = tensors(store)
    assert all(torch.equal(held[f"model/{name}"], value) for name, value in before.items())


def test_save__a_second_request_waits_for_the_first_and_says_so(store: Store) -> None:
    said: list[str] = []
    checkpoints = make_checkpoints(store)
    with lines_to(said.append):
        checkpoints.save(10, 40, make_stepper(make_method(seed=1)))
        checkpoints.save(20, 80, make_stepper(make_method(seed=2)))
    assert said == ["step 20: the checkpoint of step 10 is not written yet; waiting for it"]
    checkpoints.finish()
    assert [found.step for found in checkpoints.newly_saved()] == [10, 20]
    assert newest_good(store, pytest.fail)[0] == "step_0000020"  # type: ignore[index]


@pytest.mark.slow
def test_part__is_safetensors(store: Store) -> None:
    stepper = make_stepper(make_method())
    make_step(stepper)
    save(make_checkpoints(store), 10, stepper)
    held, found = tensors(store), load(store.read(_part(store, "step_0000010")))
    assert held.keys() == found.keys()
    assert all(torch.equal(value, held[name].view(-1)) for name, value in found.items())


def test_marker__tells_all_that_the_future_depends_on(store: Store) -> None:
    stepper = make_stepper(make_method())
    make_step(stepper)
    save(make_checkpoints(store), 10, stepper)
    marker = json.loads(store.read(f"step_0000010/{MARKER}"))
    wanted = {"step", "samples", "seed", "manifest", "manifest_rows", "config", "versions", "world", "sha256", "steps"}
    assert wanted <= marker.keys()
    names = marker["tensors"].keys()
    assert {name.partition("/")[0] for name in names} == {"model", "exp_avg", "exp_avg_sq"}
    assert any("centre_cls" in name for name in names) and any("teacher" in name for name in names)
    assert set(marker["steps"].values()) == {1.0} and marker["steps"].keys() == set(stepper.names)


def test_failure__warns_and_leaves_what_was_there_until_there_are_too_many(tmp_path: Path) -> None:
    """A disk that takes files of 20 kB and no larger, as a full one does in the middle of a write."""
    store = open_store(str(tmp_path))
    saved(store, 10)
    said: list[str] = []
    stepper, checkpoints = make_stepper(make_method()), make_checkpoints(store, max_failed_saves=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    refused = "2 checkpoints in a row could not be saved: the file system refused"
    try:
        with lines_to(said.append):
            save(checkpoints, 20, stepper)
            with pytest.raises(StorageError, match=refused):
                save(checkpoints, 30, stepper)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(said) == 1 and "checkpoint of step 20 could not be saved: the file system refused" in said[0]
    assert "File too large" in said[0] and "the run goes on" in said[0]
    checkpoints.finish()
    assert {entry.name.partition("/")[0] for entry in store.list()} == {"step_0000010"}, "parts are swept"
    save(checkpoints, 40, stepper)
    assert complete(store) == ["step_0000010", "step_0000040"] and checkpoints.newly_saved()[-1].step == 40
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        checkpoints.save(50, 200, stepper)
        with pytest.raises(StorageError, match="the last checkpoint could not be saved"):
            checkpoints.finish(needed=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_due__by_the_clock_of_the_leading_rank(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(open_store(str(tmp_path)), every_steps=0, every_minutes=1e-9, keep_every_steps=0)
    assert not checkpoints.due(10)
    checkpoints.apply_global_status(checkpoints.local_status())
    assert checkpoints.due(10)
    save(checkpoints, 10, make_stepper(make_method()))
    assert not checkpoints.due(11)
    follower = make_checkpoints(open_store(str(tmp_path)), every_steps=0, every_minutes=1e-9)
    follower.world = World(rank=1, size=1)
    assert follower.local_status().due == 0


def test_collect__how_long_the_loop_stood_still(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(open_store(str(tmp_path)))
    save(checkpoints, 10, make_stepper(make_method()))
    (found,) = checkpoints.newly_saved()
    assert found.step == 10 and 0 < found.took_s <= found.stood_s and found.share > 0
    assert checkpoints.newly_saved() == []
