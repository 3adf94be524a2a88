"""What DeepSpeed loads when a worker starts, and what it does to parameters."""

import sys
from dataclasses import replace

import pytest

from tests.support.ranks import run_ranks
from tests.training.tiny_recipe import tiny
from training.config.batch_split import split_batch
from training.config.build import build_method, make_stepper
from training.core.world import World
from training.nn.vision_transformer import parameter_count


def _loaded(world: World) -> tuple[bool, bool]:
    """Whether a start loads the compiler, and leaves torch.compile as it was."""
    import torch

    from training.engine.deepspeed import warm_up

    before = torch.compile
    warm_up(world)
    return "torch._inductor.select_algorithm" in sys.modules, torch.compile is before


@pytest.mark.slow
def test_start__loads_no_compiler() -> None:
    """It takes a worker longer than all the rest of its engine."""
    assert run_ranks(1, _loaded, fresh=True) == [(False, True)]


def _trained(world: World) -> tuple[int, int]:
    """Numbers that learn, before and after ZeRO 3 has split them."""
    config = tiny("pass_vits", images=2 * world.size)
    config = replace(config, engine=replace(config.engine, stepper="deepspeed", zero_stage=3))
    method = build_method(config)
    before = parameter_count(method, trained=True)
    make_stepper(config, method, world, split_batch(2 * world.size, 2, world.size))
    assert sum(value.numel() for value in method.parameters()) == 0, "nothing was split"
    return before, parameter_count(method, trained=True)


@pytest.mark.slow
def test_parameter_count__whole_under_zero_3() -> None:
    ((before, after),) = run_ranks(1, _trained)
    assert before == after > 0
