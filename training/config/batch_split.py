"""How a global batch is divided among ranks, and a rank's share into micro-batches."""

import math
from typing import NamedTuple

from training.engine.settings import OptimisationConfig


class Portion(NamedTuple):
    """One rank's share of a global batch."""

    rows: int
    """Images per rank, padding included; a multiple of `micro`."""
    micro: int
    """Images taken through forward and backward at once."""


def portion(batch: int, micro_batch: int, world: int) -> Portion:
    """Equal shares for all ranks in equal micro-batches, with as little padding as that allows. `micro_batch` 0: each
    share in one."""
    share = math.ceil(batch / world)
    pieces = math.ceil(share / micro_batch) if micro_batch else 1
    micro = math.ceil(share / pieces)
    return Portion(micro * pieces, micro)


def split(optimisation: OptimisationConfig, ranks: int) -> Portion:
    """The part of one of so many ranks, by the recipe."""
    return portion(optimisation.batch, optimisation.micro_batch, ranks)
