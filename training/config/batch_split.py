"""How a global batch is divided among ranks, and a rank's share into micro-batches."""

import math
from typing import NamedTuple

from training.engine.settings import OptimisationConfig


class BatchSplit(NamedTuple):
    """One rank's share of a global batch."""

    per_rank: int
    """Images per rank, padding included; a multiple of `micro_batch`."""
    micro_batch: int
    """Images taken through forward and backward at once."""


def split_batch(batch: int, micro_batch: int, world: int) -> BatchSplit:
    """Equal shares for all ranks in equal micro-batches, with as little padding as that allows. `micro_batch` 0: each
    share in one."""
    share = math.ceil(batch / world)
    pieces = math.ceil(share / micro_batch) if micro_batch else 1
    micro_batch = math.ceil(share / pieces)
    return BatchSplit(micro_batch * pieces, micro_batch)


def split_of(optimisation: OptimisationConfig, ranks: int) -> BatchSplit:
    """The part of one of so many ranks, by the recipe."""
    return split_batch(optimisation.batch, optimisation.micro_batch, ranks)
