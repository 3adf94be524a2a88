"""A batch that one rank accumulates and one that many share are the same step, whether ranks divide it or not."""

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.small_batches import BATCH, STEPS, method, steps
from tests.support.trajectory import Trajectory
from training.core.world import World

SPLITS = {1: (8, 4, 3, 1), 2: (4, 1), 3: (3, 1), 5: (2,)}
"""Ranks -> images at once. The last of 3 ranks gets a row of padding, the last of 5 nothing else, and one rank with 3
at once a row in its last micro-batch."""
WITH_DEEPSPEED = {2: (4, 1), 3: (3,)}
STAGES = (None, 0, 1, 2, 3)
"""None: the plain stepper."""
BUCKET = 300
"""Numbers reduced at once: a group of parameters takes several, which begin and end within a parameter."""
PERSISTENT = 100
"""Numbers: in stage 3 biases and norms stay whole, and matrices do not."""
EXACT, ROUNDED = 1e-10, 2e-5
"""Of float64 with AdamW, and of float32 with SGD, whose steps are proportional to gradients: differences over the
tensor's largest change."""


def _plain(world: World) -> list[Trajectory]:
    return [steps(world, micro, torch.float64, None) for micro in SPLITS[world.size]]


def _all_engines(world: World) -> list[tuple[str, Trajectory]]:
    runs = [(f"stage {stage}, {micro} at once", (micro, torch.float32, stage))
            for stage in STAGES for micro in WITH_DEEPSPEED[world.size]]  # fmt: skip
    from training.engine import deepspeed

    deepspeed.PERSISTENT = PERSISTENT  # in this process of the test
    return [(name, steps(world, *how, bucket=BUCKET, optimizer="sgd")) for name, how in runs]


def _farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of an entry over its tensor's largest change in these steps, beyond what float32 rounds
    off when a change is added to a larger value."""
    first = method().state_dict()
    assert found.keys() == wanted.keys()
    shares = []
    for name, value in wanted.items():
        moved = (value.double() - first[name].double()).abs().max()
        held = value.abs().double() * torch.finfo(torch.float32).eps * STEPS * (found[name].dtype == torch.float32)
        shares.append(((found[name].double() - value.double()).abs() - held).max() / moved.clamp(min=1e-6))
    return float(torch.stack(shares).max())


@pytest.mark.parametrize("world", SPLITS)
def test_step__plain_in_float64(world: int) -> None:
    whole = steps(World(), BATCH, torch.float64, None)
    assert float(whole.norms[0].min()) > 0
    for found in [one for rank in run_ranks(world, _plain) for one in rank]:
        torch.testing.assert_close(found.losses, whole.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.stack(found.norms), torch.stack(whole.norms), rtol=1e-9, atol=1e-12)
        assert _farthest(found.state, whole.state) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("world", WITH_DEEPSPEED)
def test_step__every_engine_in_float32(world: int) -> None:
    whole = steps(World(), BATCH, torch.float64, None, optimizer="sgd")
    for name, found in [one for rank in run_ranks(world, _all_engines) for one in rank]:
        torch.testing.assert_close(found.losses, whole.losses, rtol=ROUNDED, atol=0)
        assert _farthest(found.state, whole.state) < ROUNDED, name
