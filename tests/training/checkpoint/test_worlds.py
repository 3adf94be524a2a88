"""Saved by one number of ranks and one stepper, restored by another: the same bits, through real processes."""

import itertools
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datapipe.storage import Store, open_store
from tests.support.ranks import run_ranks
from tests.training.checkpoint.toy import (
    make_checkpoints,
    make_method,
    make_step,
    make_stepper,
    same,
    save,
    tensors,
)
from tests.training.tiny_recipe import tiny, with_views
from training.checkpoint import Saved, complete, read_marker, verify
from training.config.batch_split import split_batch
from training.config.build import build_method
from training.config.build import make_stepper as assemble
from training.config.run_plan import clock_of
from training.core.exchange import Exchange
from training.core.host import LocalHost, lines_to
from training.core.world import World
from training.engine import ema
from training.engine.loss_scaling import LossScale
from training.engine.param_groups import group_parameters, settings_at
from training.engine.plain import PlainStepper
from training.engine.settings import EngineConfig, OptimisationConfig
from training.engine.stepper import Stepper
from training.trainer.agreement import Stop

STEPPERS = ("plain", "zero0", "zero1", "zero2", "zero3")
CHAIN = ((4, STEPPERS[:1]), (3, STEPPERS), (1, STEPPERS), (2, STEPPERS))
"""(number of ranks, their steppers): each restores what the one before saved."""
SCALE = LossScale(2.0**13, 77)


def _stepper(world: World, kind: str) -> Stepper:
    """A stepper whose state is not what is to be restored."""
    method = make_method(seed=50 + world.size)
    groups, config = group_parameters(method), OptimisationConfig(precision="fp32")
    if kind == "plain":
        return PlainStepper(method, groups, config, world)
    from training.engine.deepspeed import DeepSpeedStepper, derive_json

    engine = EngineConfig(zero_stage=int(kind[-1]))  # type: ignore[arg-type]
    settings = derive_json(engine, rows=1, micro=1, world=world.size)
    return DeepSpeedStepper(method, groups, config, world, settings=settings)


def _round_trips(world: World, folder: str, pairs: list[tuple[str, str, str]]) -> None:
    """For each (from, stepper, to): restore and save again."""
    steppers: dict[str, Stepper] = {}
    for source, kind, target in pairs:
        if kind not in steppers:
            steppers[kind] = _stepper(world, kind)
        stepper = steppers[kind]
        assert make_checkpoints(open_store(f"{folder}/{source}"), world=world).restore(stepper)[0] == 40
        assert stepper.scale == SCALE
        save(make_checkpoints(open_store(f"{folder}/{target}"), world=world), 10, stepper)


def _original(folder: Path) -> str:
    """A state in which one layer is still frozen: it has no moments and no step count."""
    stepper = make_stepper(make_method())
    frozen = {name for name in stepper.names if "last_layer" in name}
    make_step(stepper, 1)
    stepper._frozen = frozen
    make_step(stepper, 2)
    stepper.scale = SCALE
    save(make_checkpoints(open_store(str(folder / "original"))), 10, stepper)
    return "original"


@pytest.mark.slow
def test_round_trip__any_world_stage_and_stepper(tmp_path: Path) -> None:
    """Each restores what two others saved, the second time over the state that is there by then."""
    sources, made = [_original(tmp_path)], []
    for world, kinds in CHAIN:
        pairs = []
        for number, kind in enumerate(kinds):
            first, second = (sources[(number + turn) % len(sources)] for turn in (1, 3))
            pairs += [(first, kind, f"world{world}-{kind}"), (second, kind, f"world{world}-{kind}-again")]
        run_ranks(world, _round_trips, str(tmp_path), pairs)
        made += [(world, target) for _, _, target in pairs]
        sources = [target for _, _, target in pairs[::2]]
    wanted = tensors(open_store(str(tmp_path / "original")))
    original = read_marker(open_store(str(tmp_path / "original")), "step_0000010")
    assert not any("last_layer" in key for key in wanted if not key.startswith("model/"))
    for world, target in made:
        store = open_store(str(tmp_path / target))
        marker = read_marker(store, "step_0000010")
        assert same(wanted, tensors(store)), target
        assert (marker.steps, marker.samples, marker.world) == (original.steps, 40, world), target
        sizes = [sum(fragment.numel for fragment in file.fragments) for file in marker.files]
        assert len(sizes) == world and max(sizes) < 1.35 * min(sizes), f"{target}: unequal shares {sizes}"


def _until(exchange: Exchange, stop: Stop, condition: Any) -> int:
    """Steps without a save until the condition holds, the ranks telling one another with each."""
    for steps in itertools.count(1):
        exchange.receive()
        exchange.send()
        assert not stop.reached
        if condition():
            return steps
    raise AssertionError


def _one_rank_fails(world: World, folder: str) -> tuple[list[str], list[int], list[Saved]]:
    """A save that one rank cannot write, then one that all can."""
    said: list[str] = []
    with lines_to(said.append):
        return said, *_failing(world, open_store(folder), said)


def _failing(world: World, store: Store, said: list[str]) -> tuple[list[int], list[Saved]]:
    checkpoints, exchange = make_checkpoints(store, world=world), Exchange(world)
    stop, stepper = Stop(LocalHost(), exchange, checkpoints), _stepper(world, "plain")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    checkpoints.save(10, 40, stepper)
    taken = [_until(exchange, stop, lambda: len(said) == 1)]
    checkpoints.finish()
    world.wait()
    assert complete(store) == [] and not list(store.list())
    world.wait()  # the next save writes to the same store
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(20, 80, stepper)
    found: list[Saved] = []
    taken.append(_until(exchange, stop, lambda: found.extend(checkpoints.newly_saved()) or found))
    return taken, found


@pytest.mark.slow
def test_failure__of_one_rank_is_heard_by_all_in_the_same_step(tmp_path: Path) -> None:
    (said, taken, found), other = run_ranks(2, _one_rank_fails, str(tmp_path / "run"))
    assert said == other[0] and "File too large" in said[0]
    assert taken == other[1], "the same steps on both ranks"
    assert [one.step for one in found] == [one.step for one in other[2]] == [20]
    store = open_store(str(tmp_path / "run"))
    verify(store, "step_0000020", read_marker(store, "step_0000020").files)


def _goes_on(world: World, folder: str) -> dict[str, bool]:
    """Kind of stepper -> are the weights after two steps, a save and two steps those after a restore and two steps,
    and those after another restore by the same stepper?"""
    config = tiny("pass_vits", images=2)
    _, views = with_views(config)
    clock = clock_of(config, 200)
    found = {}

    def step(stepper: Stepper, samples: int) -> None:
        now = settings_at(config.optimisation, clock.at(samples))
        stepper.apply(now, clock.at(samples))
        stepper.backward(stepper.forward(views, clock.at(samples)), last=True)
        assert stepper.step().finite
        ema.update(stepper.held(stepper.method.student), stepper.held(stepper.method.teacher), now.ema)

    from training.engine import deepspeed

    deepspeed.PERSISTENT = 100  # in this process of the test
    for kind in STEPPERS:
        weights: list[list[torch.Tensor]] = []
        engine = replace(config.engine, stepper="plain" if kind == "plain" else "deepspeed",
                         zero_stage=0 if kind == "plain" else int(kind[-1]))  # fmt: skip
        for resumed in (False, True, True):
            if len(weights) < 2:
                stepper = assemble(replace(config, engine=engine), build_method(config), world, split_batch(2, 2, 1))
            checkpoints = make_checkpoints(open_store(f"{folder}/{kind}"), world=world)
            if resumed:
                assert checkpoints.restore(stepper) == (40, "step_0000010")
            else:
                step(stepper, 200)
                step(stepper, 202)
                save(checkpoints, 10, stepper)
            step(stepper, 204)
            step(stepper, 206)
            weights.append([piece.values.clone() for piece in stepper.pieces(stepper.steps())])
        found[kind] = all(torch.equal(first, one) for first, *others in zip(*weights, strict=True) for one in others)
    return found


@pytest.mark.slow
def test_restore__every_stepper_goes_on_bit_identically(tmp_path: Path) -> None:
    """Past the epoch in which the last layer is released. Of stage 3 biases stay whole, and matrices do not."""
    for found in run_ranks(2, _goes_on, str(tmp_path)):
        assert found == dict.fromkeys(STEPPERS, True)
