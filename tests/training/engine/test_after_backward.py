"""What a step costs after its backward pass: launches on a GPU, and waits for it, counted on two CPU ranks."""

import pytest
import torch

from tests.bench.step import LAUNCHES, READS, after_backward
from tests.support.operations import HostReads, Operations
from tests.support.ranks import run_ranks
from training.core.world import World


def _counts(world: World) -> dict[str, tuple[int, dict[str, int]]]:
    """In one rank: launches and reads of a method with clipping and centres, and of one without."""
    found = {name: after_backward(name, world) for name in ("pass_vits", "personmae_vits")}
    return {name: (counted.launched.total(), dict(counted.reads)) for name, counted in found.items()}


def test_after_backward__few_launches_and_one_read() -> None:
    for counts in run_ranks(2, _counts):
        for name, (launched, reads) in counts.items():
            assert 10 < launched <= LAUNCHES, (name, launched)
            assert reads == {"tolist": READS}, (name, reads)


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: float(x.sum()), lambda x: bool((x > 0).all()),
                                  lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: x.cpu()])  # fmt: skip
def test_host_reads__finds_every_kind(read) -> None:  # type: ignore[no-untyped-def]
    values = torch.arange(3.0)
    with HostReads() as reads:
        read(values)
        assert reads.reads.total() == 1
        read(torch.tensor([1.0, 2.0]) * 2)  # the host's own
        assert reads.reads.total() == 1


def test_operations__leaves_views_out() -> None:
    values = torch.ones(4, 4)
    with Operations() as operations:
        values.view(16)[3:].add_(1)
        torch.empty(3)
    assert dict(operations.launched) == {"add_": 1}
