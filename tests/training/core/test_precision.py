"""Weights that autocast lowers: once for all micro-batches of a step, and gradients to the last bit as without that."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.operations import Operations
from training.core.precision import autocast_region, casts_kept, full_precision

CPU = torch.device("cpu")
PARTS = 3


class Network(nn.Module):
    """Two layers under autocast, one outside of any region, one where it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.outside, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, images: Tensor) -> Tensor:
        with autocast_region("bf16", CPU):
            hidden = self.lowered(self.lowered[0](images).float()[:, :8])
        hidden = self.outside(hidden.float())
        assert hidden.dtype == torch.float32
        with full_precision(CPU):
            loss: Tensor = self.head(hidden).square().sum()
        return loss


def gradients(*, kept: bool) -> tuple[list[Tensor], int, Network]:
    """Of three micro-batches, and the casts that they take."""
    torch.manual_seed(0)
    network, parts = Network(), torch.randn(PARTS, 4, 8).unbind()
    with Operations() as operations:
        if kept:
            with casts_kept(CPU):
                for part in parts:
                    network(part).backward()
        else:
            for part in parts:
                network(part).backward()
    found = [value.grad for value in network.parameters() if value.grad is not None]
    return found, operations.launched["_to_copy"], network


def test_casts_kept__weights_are_lowered_once_and_gradients_are_the_same_bits() -> None:
    (each, many, _), (once, few, _) = gradients(kept=False), gradients(kept=True)
    assert len(each) == len(once) == 8 and all(map(torch.equal, each, once))
    weights_and_biases = 4
    assert many - few == (PARTS - 1) * weights_and_biases


@pytest.mark.parametrize("kept", [False, True])
def test_casts_kept__a_changed_weight_is_lowered_again_afterwards(kept: bool) -> None:
    network = gradients(kept=kept)[2]
    before = network(torch.ones(1, 8))
    with torch.no_grad():
        network.lowered[0].weight.zero_()
        network.lowered[2].weight.zero_()
    assert not torch.equal(before, network(torch.ones(1, 8)))
