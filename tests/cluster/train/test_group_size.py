"""How many workers a run has on clusters that have, may get or lose machines."""

from typing import Any

import pytest

from cluster.train.group_size import LARGEST, group_size, room
from cluster.train.trainer_setup import share_of
from datapipe.core.errors import ConfigError
from training.config.cluster import ClusterConfig

GPUS = {"CPU": 1.0, "GPU": 1}


def machine(gpus: int, *, cpus: float = 96.0, alive: bool = True) -> dict[str, Any]:
    """One of Ray's, as `ray.nodes` has it."""
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": float(gpus)} if gpus else {}), "memory": 1e11}}


def of(present: int, *, later: float | None = 0.0, useful: int = 512, embedded: bool = False, **given: int) -> tuple:
    found = group_size(ClusterConfig(**given), useful=useful, present=present, later=later, embedded=embedded)
    return found.least, found.most, found.elastic


def test_room__whole_workers_of_each_living_machine() -> None:
    nodes = [machine(8), machine(8), machine(0), machine(8, alive=False)]
    assert room(nodes, GPUS) == 16
    assert room([machine(8, cpus=20)], {"CPU": 4.0, "GPU": 1}) == 5, "cores for five"
    assert room([machine(0, cpus=8), machine(0, cpus=3)], {"CPU": 2.0}) == 5
    assert room([machine(0, cpus=4)], {"CPU": 1.33}) == 3 and room([machine(0, cpus=0.3)], {"CPU": 0.1}) == 3
    assert room([], GPUS) == 0


def test_share__as_many_fit_as_shares_were_made() -> None:
    """Ray Train divides the sum of the shares by one of them."""
    for cores in range(1, 129):
        for workers in range(1, min(cores, 24) + 1):
            share = share_of(cores, workers)
            total = 0.0
            for _ in range(workers):
                total += share
            assert total <= cores and total // share == workers == room([machine(0, cpus=total)], {"CPU": share})


def test_unset__all_that_is_there_and_what_is_left_of_it() -> None:
    """Two machines of 8 GPUs: 16 workers; with one of them gone 8, and more where machines join."""
    present = room([machine(8), machine(8)], GPUS)
    assert present == 16 and of(present) == (1, 512, True)
    assert of(present, useful=4096) == (1, LARGEST, True) and of(2_000, useful=4096) == (1, 2_000, True)
    assert of(present, min_workers=8) == (8, 512, True)
    assert of(0) == (1, 512, True), "machines may come"


def test_unset__no_more_than_the_batch_has_images_for() -> None:
    assert of(16, useful=12) == (1, 12, True)
    assert of(3, useful=1) == (1, 1, False)


def test_unset__up_to_what_an_autoscaler_can_start() -> None:
    assert of(8, later=64.0) == (1, 64, True)
    assert of(0, later=64.0) == (1, 64, True)
    assert of(80, later=64.0) == (1, 80, True), "some are not the autoscaler's"
    assert of(16, later=None) == (1, 16, True), "it does not say: what is there"
    with pytest.raises(ConfigError, match="nothing says how much"):
        of(0, later=None)
    assert of(0, later=None, min_workers=4) == (4, 4, False)


def test_set__is_what_the_recipe_says() -> None:
    assert of(16, max_workers=8) == (1, 8, True)
    assert of(2, max_workers=8) == (1, 8, True), "begins with two, and goes on with what is left"
    assert of(2, max_workers=8, min_workers=4) == (4, 8, True)
    assert of(2, max_workers=8, min_workers=8) == (8, 8, False), "a fixed group waits"
    assert of(16, min_workers=64) == (64, 512, True) and of(16, min_workers=64, later=None) == (64, 64, False)


def test_embedded__a_fixed_group_of_what_this_machine_has() -> None:
    assert of(4, embedded=True) == (4, 4, False)
    assert of(4, embedded=True, useful=3) == (3, 3, False)
    assert of(4, embedded=True, max_workers=2) == (2, 2, False)
    assert of(4, embedded=True, max_workers=8) == (4, 4, False)
    with pytest.raises(ConfigError, match="8 workers at least, and this machine has room for 4"):
        of(4, embedded=True, max_workers=8, min_workers=8)
