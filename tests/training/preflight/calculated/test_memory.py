"""Calculated memory: exact where tensors can be counted, and split as ZeRO splits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.tiny_recipe import tiny, with_views
from training.config.batch_split import split_batch
from training.config.build import build_method, make_stepper
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.core.world import World
from training.engine import param_groups
from training.engine.plain import PlainStepper
from training.preflight.calculated.computation import pixels
from training.preflight.calculated.memory import FRAGMENTATION, FULL, RESERVED, WORKSPACE, calculate, census
from training.recipes import SHIPPED

METHODS = ("dino_vits", "dino_vitb", "pass_vits", "personvit_vits", "personmae_vits")


def with_engine(config: RunConfig, **engine: Any) -> RunConfig:
    return replace(config, engine=replace(config.engine, **engine))


def stored(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("recipe", METHODS)
def test_census__counts_every_parameter_once(recipe: str) -> None:
    config = tiny(recipe, images=2)
    sizes, method = census(config), build_method(config)
    assert sum(sizes.student.values()) == sum(value.numel() for value in method.student.parameters())
    assert sizes.parameters == sum(value.numel() for value in method.parameters())
    assert sizes.trained == sum(value.numel() for value in method.parameters() if value.requires_grad)
    assert sum(sizes.groups) == sizes.trained
    blocks = method.student.backbone.blocks
    assert sizes.student["blocks"] == sum(value.numel() for value in blocks.parameters())


def test_census__of_published_sizes() -> None:
    """PASS README and the reference code: ViT-S of 21.64 M, four heads of 22.35 M each."""
    sizes = census(load(SHIPPED / "pass_vits.toml"))
    heads = sizes.student["head MLPs"] + sizes.student["prototypes"]
    assert sum(sizes.student.values()) - heads == pytest.approx(21.64e6, rel=1e-3)
    assert heads / 4 == pytest.approx(22.35e6, rel=1e-3)


@pytest.mark.parametrize("recipe", METHODS)
def test_state__is_that_of_a_real_step(recipe: str) -> None:
    config = tiny(recipe, images=2)
    config = replace(config, method=replace(config.method, **_nothing_frozen(config)))
    method, views = with_views(config)
    stepper = make_stepper(config, method, World(), split_batch(2, 2, 1))
    assert isinstance(stepper, PlainStepper)
    progress = clock_of(config, 200).at(0)
    stepper.apply(param_groups.settings_at(config.optimisation, progress), progress)
    stepper.backward(stepper.forward(views, progress), last=True)
    trained = [value for value in method.parameters() if value.requires_grad]
    gradients = stored(stepper._gradient(value) for value in trained)
    stepper.step()
    moments = [state[key] for state in stepper.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]

    sizes = census(config)
    state = calculate(config, sizes, world=1, cuda=False).state
    assert state["student"] == stored(method.student.parameters())
    assert state["teacher"] == stored(method.teacher.parameters())
    assert state["moments of AdamW"] == stored(moments) == 2 * gradients
    assert gradients == FULL * sizes.trained
    images = [value for name, value in views.items() if name in ("global", "local", "region_a", "region_b")]
    assert state["batch"] == stored(images) * 5 // 4  # and as bytes, before they are normalised


def _nothing_frozen(config: RunConfig) -> dict[str, int]:
    return {} if config.method.name == "personmae" else {"freeze_last_layer_epochs": 0}


@pytest.mark.parametrize("world", [2, 4, 7])
def test_state__is_split_as_the_stage_says(world: int) -> None:
    config = load(SHIPPED / "pass_vitb.toml")
    sizes = census(config)
    states = [calculate(with_engine(config, zero_stage=stage), sizes, world=world, cuda=True).state
              for stage in range(4)]  # fmt: skip
    own = -(-sizes.trained // world)
    assert states[0]["moments of AdamW"] == 8 * sizes.trained
    assert "ZeRO's copy of its parameters" not in states[0]
    for state in states[1:]:
        assert state["moments of AdamW"] == 8 * own and state["ZeRO's copy of its parameters"] == 4 * own
    for state in states[:3]:
        assert state["student"] == 4 * sum(sizes.student.values()) and state["teacher"] == 4 * sizes.teacher
    assert states[3]["teacher"] == 4 * -(-sizes.teacher // world)
    assert states[3]["gradients"] == 4 * own and not any("gradients" in state for state in states[:3])


def test_state__views_are_copied_into_two_slots_of_a_gpu() -> None:
    config = load(SHIPPED / "pass_vits.toml")
    sizes = census(config)
    cpu, gpu = (calculate(config, sizes, world=8, cuda=cuda).state["batch"] for cuda in (False, True))
    values = 3 * pixels(config, config.optimisation.micro_batch)
    assert cpu == 5 * values and gpu == 6 * values


def test_moments__gradients_are_whole_where_nothing_splits_them() -> None:
    config = with_engine(load(SHIPPED / "pass_vitb.toml"), bucket=1_000)
    sizes = census(config)
    reduced = [calculate(with_engine(config, zero_stage=stage), sizes, world=8, cuda=True).moments["reduction"]
               for stage in (1, 2)]  # fmt: skip
    assert reduced[0] - reduced[1] == FULL * (sizes.trained - sizes.largest)


def test_moments__the_plain_stepper_adds_ranks_in_one_copy_of_all_gradients() -> None:
    config = tiny("pass_vits", images=4)
    sizes = census(config)
    alone, two = (calculate(config, sizes, world=world, cuda=False) for world in (1, 2))
    beside = [memory.moments["reduction"] - sum(memory.state.values()) for memory in (alone, two)]
    assert beside == [FULL * sizes.trained, 2 * FULL * sizes.trained]


def test_moments__what_is_averaged_beside_the_backward_pass_counts_there() -> None:
    """On GPUs; elsewhere DeepSpeed has a bucket of its own in stage 2, and none in stage 1."""
    config = load(SHIPPED / "pass_vitb.toml")
    sizes = census(config)
    own = -(-sizes.trained // 8)
    assert own > 1_000_000

    def backward(bucket: int, stage: int, *, cuda: bool = True, world: int = 8, reduction: str = "fp32") -> int:
        one = with_engine(config, bucket=bucket, zero_stage=stage)
        one = replace(one, optimisation=replace(one.optimisation, reduction=reduction))  # type: ignore[arg-type]
        return calculate(one, sizes, world=world, cuda=cuda).moments["backward"]

    for stage in (1, 2):
        assert backward(1_000_000, stage) - backward(1_000, stage) == FULL * 999_000
        assert backward(2 * sizes.trained, stage) - backward(1_000, stage) == FULL * (own - 1_000)
        assert backward(1_000_000, stage, reduction="bf16") - backward(1_000_000, stage) == 2_000_000
    assert backward(1_000_000, 1, cuda=False) == backward(1_000, 1, cuda=False)
    assert backward(1_000_000, 2, cuda=False) - backward(1_000, 2, cuda=False) == FULL * 999_000
    assert backward(1_000_000, 1, world=1) - backward(1_000, 1, world=1) == FULL * 999_000


def test_moments__accumulated_gradients_are_there_in_the_forward_pass() -> None:
    config = tiny("pass_vits", images=4)
    halved = replace(config, optimisation=replace(config.optimisation, batch=8))
    sizes = census(config)
    once, twice = (calculate(one, sizes, world=1, cuda=False) for one in (config, halved))
    assert twice.moments["forward"] - once.moments["forward"] == FULL * sizes.trained
    assert twice.saved == once.saved


@pytest.mark.parametrize("change", [
    {"backbone": {"checkpoint_blocks": True}}, {"optimisation": {"micro_batch": 32}}, {"engine": {"zero_stage": 2}},
], ids=["checkpoint_blocks", "micro_batch", "zero_stage"])  # fmt: skip
def test_needed__less_by_each_of_the_dials(change: dict[str, dict[str, Any]]) -> None:
    config = load(SHIPPED / "pass_vitl.toml")
    config = replace(config, optimisation=replace(config.optimisation, micro_batch=64), engine=replace(
        config.engine, zero_stage=0))  # fmt: skip
    ((part, values),) = change.items()
    changed = replace(config, **{part: replace(getattr(config, part), **values)})
    before, after = (calculate(one, census(config), world=8, cuda=True) for one in (config, changed))
    assert after.needed < before.needed
    assert before.needed == before.peak + RESERVED + round(FRAGMENTATION * before.peak)


@pytest.mark.slow
def test_saved__a_gpu_in_bf16_keeps_the_softmax_twice_unless_it_is_fused() -> None:
    config = load(SHIPPED / "dino_vits.toml")
    plain = replace(config, backbone=replace(config.backbone, attention="plain"))
    sizes = census(config)
    fused, kept = (calculate(one, sizes, world=8, cuda=True).saved["blocks"] for one in (config, plain))
    rows, tokens, heads, branches = [2 * 64, 8 * 64], [129, 33], 6, 12 * (1 - 0.1 / 2)  # drop path spares the rest
    weights = sum(branches * heads * row * count * (6 * count - 4) for row, count in zip(rows, tokens, strict=True))
    assert kept - fused == pytest.approx(weights, abs=4)


def test_needed__a_gpu_s_products_have_a_workspace() -> None:
    config = tiny("dino_vits", images=2, precision="fp32", attention="fused")
    there, here = (calculate(config, census(config), world=1, cuda=cuda) for cuda in (True, False))
    slot = there.state["batch"] - here.state["batch"]  # the second one that views are copied to
    more = [there.moments[moment] - here.moments[moment] - slot for moment in ("forward", "backward", "reduction")]
    assert more == [WORKSPACE] * 2 + [0]


def test_moments__the_backward_pass_begins_with_a_gradient_of_the_prototypes() -> None:
    config = with_engine(load(SHIPPED / "dino_vits.toml"), stepper="plain")
    config = replace(config, optimisation=replace(config.optimisation, batch=2, micro_batch=2))
    more = replace(config, method=replace(config.method, head=replace(config.method.head, bottleneck=512)))
    moments = [calculate(one, census(one), world=1, cuda=True) for one in (config, more)]
    least, most = (need.moments["backward"] - sum(need.state.values()) - sum(need.saved.values()) for need in moments)
    assert most - least == FULL * 256 * config.method.head.out_dim


def test_needed__what_is_erased_is_there_twice() -> None:
    config = load(SHIPPED / "supervised.toml")
    config = replace(config, method=replace(config.method, classes=10))
    none = replace(config, method=replace(config.method, erase=0.0))
    with_, without = (calculate(one, census(one), world=1, cuda=True).moments["forward"] for one in (config, none))
    assert with_ - without == FULL * config.optimisation.micro_batch * 3 * 256 * 128


def test_census__needs_no_memory() -> None:
    before = torch.random.get_rng_state()
    census(load(SHIPPED / "pass_vitl.toml"))
    assert torch.equal(before, torch.random.get_rng_state())
