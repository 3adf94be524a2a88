"""Gradients averaged while the backward pass goes on: the same sums, in one order on all ranks, and no race."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.small_batches import steps
from tests.support.streams import Races, Streams
from training.core.world import World
from training.engine import deepspeed, overlapped_reduction
from training.engine.overlapped_reduction import OverlappedReduction, buckets

STAGES = (1, 2)
BUCKET = 300
"""Numbers: a group of parameters takes several, which begin and end within a parameter."""


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 50))
def test_buckets__cover_each_row_once_within_parts(sizes: list[int], world: int, most: int) -> None:
    part = -(-sum(sizes) // world)
    row = list(enumerate(sizes))
    found = buckets([row], [part], most)
    starts = {number: sum(sizes[:number]) for number in range(len(sizes))}
    covered = []
    for bucket in found:
        places = [starts[one.number] + one.start + at for one in bucket.pieces for at in range(one.size)]
        assert 0 < len(places) <= most and {place // part for place in places} == {bucket.owner}
        covered += places
    assert sorted(covered) == list(range(sum(sizes)))
    expected_first = [min(bucket.numbers) for bucket in found]
    assert expected_first == sorted(expected_first, reverse=True)


def _trained(world: World) -> dict[Any, tuple[Any, Any, list[tuple[int, int]]]]:
    """(stage, images at once, format) -> what is there at the end without and with overlap, and for each bucket how
    many of all gradients had come when it was started."""
    found = {}
    for stage in STAGES:
        for micro, reduction in ((4, "fp32"), (1, "fp32"), (4, "bf16")):
            runs, begun = [], []
            for overlap in (False, True):
                with pytest.MonkeyPatch.context() as patch:
                    if overlap:
                        _overlap(patch, begun)
                    runs.append(steps(world, micro, torch.float32, stage, bucket=BUCKET, reduction=reduction))
            found[stage, micro, reduction] = (*[(run.losses, run.norms, run.state) for run in runs], begun)
    return found


def _overlap(patch: pytest.MonkeyPatch, begun: list[tuple[int, int]]) -> None:
    """As on GPUs, in this process of a test on CPUs."""
    start = OverlappedReduction._start

    def noted(reduction: OverlappedReduction) -> None:
        begun.append((len(reduction._arrived), len(reduction._parameters)))
        start(reduction)

    patch.setattr(deepspeed, "overlaps", lambda world, stage: True)
    patch.setattr(OverlappedReduction, "_start", noted)


@pytest.mark.slow
def test_overlap__changes_no_bit_of_two_ranks() -> None:
    for found in run_ranks(2, _trained):
        for how, (plain, overlapped, begun) in found.items():
            assert plain[0] == overlapped[0] and all(map(torch.equal, plain[1], overlapped[1])), how
            assert plain[2].keys() == overlapped[2].keys()
            assert all(torch.equal(value, overlapped[2][name]) for name, value in plain[2].items()), how
            early = sum(arrived < of for arrived, of in begun)
            assert 2 * early > len(begun) > 0, (how, "most start before the backward pass has come to its end")


class Sent:
    """Stands in for the collective of one rank of two: what is sent, and the sum where that rank has sent as much."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.owners: list[int] = []
        patch.setattr(overlapped_reduction, "reduce_to", self)

    def __call__(self, values: Tensor, rank: int, group: Any) -> Tensor:
        self.owners.append(rank)
        return values.mul_(2)


def _zero(layers: torch.nn.Sequential, *, stage: int) -> Any:
    """What is used of DeepSpeed's optimizer, on rank 0 of 2."""
    values = list(layers.parameters())
    size = -(-sum(value.numel() for value in values) // 2)
    return SimpleNamespace(
        bit16_groups=[values], partition_size=[size], partition_gradients=stage == 2, dp_process_group=None,
        setup_buckets=lambda: None, overlapping_partition_gradients_reduce_epilogue=lambda: None,
    )  # fmt: skip


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return Streams(monkeypatch)


def _backward(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> tuple[Races, dict[str, Tensor | None], Sent]:
    """Two micro-batches of three layers, of which the second's gradients are added up by stage 1."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    zero, sent = _zero(layers, stage=1), Sent(monkeypatch)
    world = World(0, 2, device=torch.device("cuda"))
    reduction = OverlappedReduction(zero, list(layers.parameters()), "fp32", world, bucket=15)
    races = Races(streams)
    races.take(layers.parameters())
    for last in (False, True):
        reduction.arm(last=last)
        with races:
            layers(torch.ones(2, 4)).sum().backward()
            if last:
                zero.reduce_gradients()
                found = {name: None if value.grad is None else value.grad.clone()
                         for name, value in layers.named_parameters()}  # fmt: skip
    return races, found, sent


def test_overlap__no_gradient_is_read_before_it_is_there(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    races, found, sent = _backward(streams, monkeypatch)
    assert races.found == [] and sent.owners == sorted(sent.owners, reverse=True) and set(sent.owners) == {0, 1}
    assert streams.host_waits == 0
    assert found["0.weight"] is not None and found["2.weight"] is found["2.bias"] is None, "of the other rank"
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    for _ in range(2):
        layers(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(found["0.weight"], layers[0].weight.grad)


@pytest.mark.parametrize("lost", ["beside", "join"])
def test_overlap__each_of_the_waits_is_needed(streams: Streams, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    from tests.support import streams as stand_ins

    real = stand_ins.Stream.wait_stream

    def without(stream: Any, other: Any) -> None:
        if (stream is streams.default) != (lost == "join"):
            real(stream, other)

    monkeypatch.setattr(stand_ins.Stream, "wait_stream", without)
    assert _backward(streams, monkeypatch)[0].found


def test_overlap__a_gradient_that_grows_after_it_was_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Sent(monkeypatch)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
    reduction = OverlappedReduction(_zero(layers, stage=2), list(layers.parameters()), "fp32", World(0, 2), bucket=99)
    reduction.arm(last=False)
    layers(torch.ones(2, 4)).sum().backward()
    with pytest.raises(AssertionError, match="grew after"):
        layers(torch.ones(2, 4)).sum().backward()
