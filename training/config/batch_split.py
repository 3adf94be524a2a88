"""How a global batch is divided among ranks, and a rank's share into micro-batches."""

import math
from typing import NamedTuple

from training import methods
from training.config.run_config import RunConfig

MACHINE_GPUS = 8
"""Ranks that a recipe which names none is counted with: one machine of 8 GPUs."""


class BatchSplit(NamedTuple):
    """One rank's share of a global batch."""

    per_rank: int
    """Images per rank, padding included; a multiple of `micro_batch`."""
    micro_batch: int
    """Images taken through forward and backward at once."""

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one step."""
        return self.per_rank // self.micro_batch


def split_batch(batch: int, micro_batch: int, world: int, group: int = 1) -> BatchSplit:
    """Equal shares for all ranks in equal micro-batches, with as little padding as that allows, whatever the number of
    ranks. `micro_batch` 0: each share in one. `group`: images that must stay together; a micro-batch is whole groups,
    at least one, and the batch a multiple of them."""
    share = math.ceil(batch / group / world)
    pieces = math.ceil(share / max(1, micro_batch // group)) if micro_batch else 1
    micro_batch = math.ceil(share / pieces)
    return BatchSplit(group * micro_batch * pieces, group * micro_batch)


def split_of(config: RunConfig, ranks: int) -> BatchSplit:
    """The part of one of so many ranks, by the recipe."""
    return split_batch(config.optimisation.batch, config.optimisation.micro_batch, ranks, group_of(config))


def group_of(config: RunConfig) -> int:
    """Images of a batch that must be on one rank and in one micro-batch, where the recipe has such groups; else 1."""
    clusters = methods.of(config.method).by_cluster(config.method)
    return max(1, clusters.group) if clusters is not None else 1


def most_useful(config: RunConfig) -> int:
    """Ranks beyond which some have nothing but padding."""
    return max(1, config.optimisation.batch // group_of(config))


def expected_workers(config: RunConfig) -> int:
    """Ranks to count with where nothing runs yet: the most that the recipe allows, or where it leaves that to the
    cluster one machine of 8 GPUs, and not fewer than the recipe's least."""
    machine = config.cluster
    return machine.max_workers or max(machine.min_workers, min(MACHINE_GPUS, most_useful(config)))
