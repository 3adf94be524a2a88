"""What DeepSpeed loads when a worker starts."""

import sys

from tests.ranks import run_ranks
from training.engine.world import World


def _loaded(world: World) -> tuple[bool, bool]:
    """Whether a start loads the compiler, and leaves torch.compile as it was."""
    import torch

    from training.engine.deepspeed import warm_up

    before = torch.compile
    warm_up(world)
    return "torch._inductor.select_algorithm" in sys.modules, torch.compile is before


def test_start__loads_no_compiler() -> None:
    """It takes a worker longer than all the rest of its engine."""
    assert run_ranks(1, _loaded, fresh=True) == [(False, True)]
