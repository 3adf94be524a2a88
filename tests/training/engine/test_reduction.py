"""What is sent when gradients are added up over ranks: in which format, how much, and how far bf16 is from float32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datapipe.core.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.small_batches import BATCH, STEPS, method, steps
from training.core.world import World
from training.engine import reduction
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_STAGE = {None: "allreduce_", 0: "allreduce_", 1: "_reduce_scatter_base_", 2: "reduce_", 3: "_reduce_scatter_base_"}
"""ZeRO stage (None: the plain stepper) -> the collective that adds gradients up."""
TRAINED = sum(value.numel() for value in method().parameters() if value.requires_grad)
SMALL = 500
"""Numbers of a collective that is no sum of gradients: losses and metrics of a step, norms, a seed."""


class Recorder(TorchDispatchMode):
    """Notes collectives at PyTorch's dispatcher, whoever calls them: name, format and numbers of what a rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            given = args[1] if name == "_reduce_scatter_base_" else args[0]
            tensors = [given] if isinstance(given, Tensor) else [one for one in given if isinstance(one, Tensor)]
            self.calls += [(name, one.dtype, one.numel()) for one in tensors]
        return func(*args, **(kwargs or {}))


def _recorded(world: World, stages: list[int | None]) -> dict[Any, tuple[list[Any], list[float], Tensor]]:
    """(stage, format) -> collectives, losses and first gradient norms of two steps."""
    found = {}
    for stage in stages:
        for name in FORMATS:
            with Recorder() as recorder:
                run = steps(world, BATCH, torch.float32, stage, optimizer="sgd", reduction=name)
            found[stage, name] = recorder.calls, run.losses, run.norms[0]
    return found


def _check(world: int, stages: list[int | None]) -> None:
    for found in run_ranks(world, _recorded, stages):
        for stage in stages:
            for name, dtype in FORMATS.items():
                calls = found[stage, name][0]
                sums = [call for call in calls if "reduce" in call[0] and call[2] > SMALL]
                assert {call[0] for call in sums} == {OF_STAGE[stage]}, (stage, name)
                assert {call[1] for call in sums} == {dtype}, (stage, name)
                assert STEPS * TRAINED <= sum(call[2] for call in sums) + 2 * SMALL < 1.1 * STEPS * TRAINED
            (_, exact, norms), (_, lowered, near) = found[stage, "fp32"], found[stage, "bf16"]
            assert exact[0] == lowered[0] and exact[1] != lowered[1], "only gradients are lowered, and they are"
            # each of `world` summands and partial sums is rounded to 8 bits: the norm of a whole moves by less
            torch.testing.assert_close(near, norms, rtol=world * 2.0**-8, atol=1e-6)
            assert not torch.equal(near, norms)
            assert abs(lowered[1] - exact[1]) < 2.0**-7 * abs(exact[1])


def test_reduction__plain_sends_what_it_is_told_to() -> None:
    _check(2, [None])


@pytest.mark.slow
def test_reduction__deepspeed_sends_what_it_is_told_to() -> None:
    _check(2, [0, 1, 2, 3])


def _gradients(world: World) -> tuple[list[Tensor], list[Tensor]]:
    """Sums in both formats of gradients that are drawn on each rank."""
    generator = torch.Generator().manual_seed(world.rank)
    drawn = [torch.randn(shape, generator=generator) for shape in ((300,), (7, 11), ())]
    sums = []
    for name in reduction.BYTES:
        mine = [value.clone() for value in drawn]
        reduction.sum_over_ranks(mine, name)
        sums.append(mine)
    return sums[0], sums[1]


def test_sum_over_ranks__bf16_is_within_its_rounding_of_float32() -> None:
    world = 3
    parts = [[torch.randn(shape, generator=generator) for shape in ((300,), (7, 11), ())]
             for generator in (torch.Generator().manual_seed(rank) for rank in range(world))]  # fmt: skip
    for exact, lowered in run_ranks(world, _gradients):
        for index, (one, other) in enumerate(zip(exact, lowered, strict=True)):
            torch.testing.assert_close(one, sum(part[index] for part in parts), rtol=1e-5, atol=1e-6)
            size = sum(part[index].abs() for part in parts)
            assert other.dtype == torch.float32 and bool(((one - other).abs() <= world * 2.0**-8 * size).all())


def test_reduction__bf16_of_float64_is_refused() -> None:
    double = method().double()
    config = replace(OptimisationConfig(), reduction="bf16")
    with pytest.raises(ConfigError, match="float64 are not reduced in bf16"):
        PlainStepper(double, group_parameters(double), config, World())


@pytest.mark.parametrize("count", [1, 4, 9, 100])
def test_row__stretches_are_those_of_one_flat_tensor(count: int) -> None:
    group = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (1,), (5,), (4, 2))]
    transposed = torch.arange(6.0).view(3, 2).t()
    group[0].grad, group[1].grad, group[2].grad = transposed, torch.ones(1), torch.full((5,), 2.0)
    flat = torch.cat([transposed.reshape(-1), torch.ones(1), torch.full((5,), 2.0), torch.zeros(8 + 21 + count)])
    row = reduction._Row(group)
    for start in range(21):
        assert torch.equal(torch.cat(row.stretch(start, count)), flat[start : start + count])
    row.stretch(6, 1)[0].fill_(7.0)
    assert group[1].grad is not None and float(group[1].grad) == 7.0, "views, so that averages can be put there"
