import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datapipe.errors import DataError
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from training.backbone import BackboneConfig
from training.checkpoint import MARKER, STATE, Checkpoints, complete, describe, newest_good, read_state
from training.config import CheckpointConfig, OptimisationConfig
from training.engine.optimisation import group_parameters
from training.engine.plain import PlainStepper
from training.engine.scaling import LossScale
from training.engine.world import World
from training.heads import HeadConfig
from training.methods.base import Method
from training.methods.pass_reid import Pass, PassConfig

ABOUT = {"manifest": "a" * 64, "manifest_rows": 100, "seed": 1, "batch": 4, "world": 1}


def _method(seed: int = 0) -> Method:
    torch.manual_seed(seed)
    backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=8, depth=1, heads=1)
    return Pass(PassConfig(local_size=(8, 8), head=HeadConfig(out_dim=8, hidden=8, bottleneck=4)), backbone)


def _stepper(method: Method) -> PlainStepper:
    return PlainStepper(method, group_parameters(method), OptimisationConfig(), World())


def _checkpoints(store: Store, said: list[str] | None = None, **changes: Any) -> Checkpoints:
    config = CheckpointConfig(every_steps=10, keep_last=2, keep_every_steps=20)
    say = (said if said is not None else []).append
    return Checkpoints(store, config, World(), about={**ABOUT, **changes}, say=say)


def _saved(store: Store, *steps: int) -> dict[int, Method]:
    methods = {}
    for step in steps:
        methods[step] = _method(seed=step)
        _checkpoints(store).save(step, 4 * step, _stepper(methods[step]))
    return methods


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "checkpoints"))
    server: S3Server = request.getfixturevalue("s3")
    return open_store(f"s3://{server.bucket()}/run/checkpoints", server.storage)


def _equal(left: Method, right: Method) -> bool:
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def test_restore__gives_back_every_tensor_and_the_position(store: Store) -> None:
    before = _saved(store, 10)[10]
    after = _method(seed=99)
    assert not _equal(before, after)
    assert _checkpoints(store).restore(_stepper(after)) == (40, "step_0000010")
    assert _equal(before, after)


def test_restore__the_loss_scale_where_a_checkpoint_has_one(store: Store) -> None:
    scaled = _stepper(_method())
    scaled.scale = LossScale(2.0**13, 77)
    _checkpoints(store).save(10, 40, scaled)
    stepper = PlainStepper(scaled.method, scaled.groups, OptimisationConfig(precision="fp16"), World())
    _checkpoints(store).restore(stepper)
    assert stepper.scale == LossScale(2.0**13, 77)
    marker = json.loads(store.read(f"step_0000010/{MARKER}"))
    del marker["loss_scale"]  # as it was saved before there was any
    store.replace(f"step_0000010/{MARKER}", json.dumps(marker).encode())
    _checkpoints(store).restore(stepper)
    assert stepper.scale == LossScale()


def test_restore__nothing_there(store: Store) -> None:
    method = _method()
    assert _checkpoints(store).restore(_stepper(method)) == (0, None)


@pytest.mark.parametrize("damage", ["flip", "cut", "no marker", "broken marker", "no state"])
def test_restore__a_damaged_checkpoint_is_passed_over_with_a_warning(store: Store, damage: str) -> None:
    methods = _saved(store, 10, 20)
    state, marker = f"step_0000020/{STATE}", f"step_0000020/{MARKER}"
    content = store.read(state)
    if damage == "flip":
        store.replace(state, content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut":
        store.replace(state, content[: len(content) // 2])
    elif damage == "broken marker":
        store.replace(marker, b"{")
    else:
        store.delete(marker if damage == "no marker" else state)
    said: list[str] = []
    method = _method(seed=99)
    assert _checkpoints(store, said).restore(_stepper(method)) == (40, "step_0000010")
    assert _equal(method, methods[10])
    assert (damage == "no marker") == (not said)  # without its marker it never existed
    assert all("step_0000020 is passed over" in line for line in said)


def test_restore__a_checkpoint_of_other_data_is_refused(store: Store) -> None:
    _saved(store, 10)
    method = _method()
    after_a_removal = _checkpoints(store, manifest="b" * 64)
    after_a_removal.replaces = ("c" * 64, "a" * 64)
    assert after_a_removal.restore(_stepper(method))[0] > 0
    with pytest.raises(DataError, match=r"other data: manifest aaaaaaaaaaaa \(100 crops\), now bbbbbbbbbbbb"):
        _checkpoints(store, manifest="b" * 64).restore(_stepper(method))


def test_restore__another_model_is_refused_by_name(store: Store) -> None:
    _saved(store, 10)
    backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=16, depth=1, heads=1)
    other = Pass(PassConfig(local_size=(8, 8), head=HeadConfig(out_dim=8, hidden=8, bottleneck=4)), backbone)
    with pytest.raises(DataError, match="student.backbone.blocks.0.attn.proj.weight"):
        _checkpoints(store).restore(_stepper(other))


def test_save__keeps_the_last_and_those_for_evaluation(store: Store) -> None:
    _saved(store, 10, 20, 30, 40, 50, 60, 70)
    assert complete(store) == [f"step_{step:07d}" for step in (20, 40, 60, 70)]
    left = {entry.name.partition("/")[0] for entry in store.list()}
    assert left == set(complete(store))


def test_save__sweeps_what_was_never_finished(store: Store) -> None:
    store.replace(f"step_0000005/{STATE}", b"half")
    _saved(store, 10)
    assert {entry.name.partition("/")[0] for entry in store.list()} == {"step_0000010"}


def test_marker__tells_all_that_the_future_depends_on(store: Store) -> None:
    _saved(store, 10)
    marker = json.loads(store.read(f"step_0000010/{MARKER}"))
    wanted = {"step", "samples", "seed", "manifest", "manifest_rows", "config", "versions", "world", "sha256", "steps"}
    assert wanted <= marker.keys()
    _, state = read_state(store, "step_0000010")
    kinds = {name.partition("/")[0] for name in state}
    assert kinds == {"model"}  # no step was made
    assert any("centre_cls" in name for name in state) and any("teacher" in name for name in state)


def test_describe__names_the_damaged(store: Store) -> None:
    _saved(store, 10, 20)
    store.replace(f"step_0000010/{STATE}", b"short")
    lines = describe(store)
    assert "DAMAGED" in lines[0] and "good" in lines[1]
    assert newest_good(store, print) is not None


def test_load__moments_survive(store: Store) -> None:
    method = _method()
    stepper = _stepper(method)
    for value in stepper.parameters.values():
        value.grad = torch.randn_like(value)
    stepper.optimizer.step()
    _checkpoints(store).save(10, 40, stepper)
    again = _method(seed=5)
    restored = _stepper(again)
    _checkpoints(store).restore(restored)
    before, after = stepper.optimizer_state(), restored.optimizer_state()
    for name, state in before.items():
        assert state.step == after[name].step == 1
        assert state.tensors.keys() == after[name].tensors.keys() == {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, after[name].tensors[key]) for key, value in state.tensors.items())
