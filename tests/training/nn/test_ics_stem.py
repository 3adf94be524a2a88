"""The convolutional stem: batch statistics over real images of all ranks, against PyTorch's own norms and by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import run_ranks
from training.core.collectives import all_reduce
from training.core.world import World
from training.nn.ics_stem import CHANNELS, ConvStem, PooledBatchNorm, pooled_statistics, settle, take_statistics
from training.nn.vision_transformer import BackboneConfig, VisionTransformer, parameter_count


def images(count: int = 5, height: int = 16, width: int = 8) -> Tensor:
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stem() -> ConvStem:
    torch.manual_seed(0)
    made = ConvStem(patch=4, width=12).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def with_library_norms(made: ConvStem) -> nn.Sequential:
    """The same weights under torch.nn.BatchNorm2d."""

    def twin(norm: PooledBatchNorm) -> nn.BatchNorm2d:
        library = nn.BatchNorm2d(len(norm.weight)).double()
        library.load_state_dict(norm.state_dict())
        return library

    class Split(nn.Module):
        def __init__(self, instance: nn.Module, batch: nn.Module) -> None:
            super().__init__()
            self.instance, self.batch = instance, batch

        def forward(self, values: Tensor) -> Tensor:
            half = CHANNELS // 2
            return torch.cat([self.instance(values[:, :half]), self.batch(values[:, half:])], dim=1)

    layers: list[Any] = list(made.conv)
    for place in (1, 4):
        layers[place] = Split(layers[place].IN, twin(layers[place].BN))
    layers[7] = twin(layers[7])
    return nn.Sequential(*layers, made.proj)


def test_training__outputs_gradients_and_running_statistics_are_the_library_ones() -> None:
    made = stem()
    library = with_library_norms(made)
    pictures, local = images(), images(4, 8, 4)
    theirs = [library(stack).flatten(2).transpose(1, 2) for stack in (pictures, local)]
    sum(stack.square().mean() for stack in theirs).backward()  # type: ignore[union-attr]
    expected = [parameter.grad.clone() for parameter in made.proj.parameters()]  # type: ignore[union-attr]
    expected.append(made.conv[0].weight.grad.clone())
    made.zero_grad()
    ours = [made(stack) for stack in (pictures, local)]
    sum(stack.square().mean() for stack in ours).backward()  # type: ignore[union-attr]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    found = [*(parameter.grad for parameter in made.proj.parameters()), made.conv[0].weight.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    norm = made.conv[7]
    assert isinstance(norm, PooledBatchNorm) and not norm.running_mean.any()  # nothing moves before the step is done
    settle(made, take_statistics(made, torch.tensor(1.0)))
    for name, value in library[7].state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, rtol=0, atol=1e-12)
    assert int(norm.num_batches_tracked) == 2  # one per resolution
    assert take_statistics(made, torch.tensor(1.0)) == {}
    made.eval(), library.eval()
    torch.testing.assert_close(made(local), library(local).flatten(2).transpose(1, 2), rtol=0, atol=1e-12)
    assert take_statistics(made, torch.tensor(1.0)) == {}


def test_padding__leaves_no_trace() -> None:
    made = stem()
    whole = made(images(3))
    statistics = take_statistics(made, torch.tensor(1.0))
    padded_images = torch.cat([images(3), torch.full((2, 3, 16, 8), 9.0, dtype=torch.float64)])
    padded = made(padded_images, torch.tensor([True, True, True, False, False]))
    torch.testing.assert_close(padded[:3], whole, rtol=0, atol=1e-12)
    for name, value in take_statistics(made, torch.tensor(1.0)).items():
        torch.testing.assert_close(value, statistics[name], rtol=0, atol=1e-12)


def test_pooled_statistics__equal_naive_loops() -> None:
    values, real = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.tensor([True, False, True])
    count, mean, variance = pooled_statistics(values, real)
    for channel in range(2):
        found = [float(values[b, channel, y, x]) for b in (0, 2) for y in range(2) for x in range(2)]
        middle = sum(found) / len(found)
        assert float(count) == len(found) == 8
        assert float(mean[channel]) == pytest.approx(middle, rel=1e-12)
        assert float(variance[channel]) == pytest.approx(sum((v - middle) ** 2 for v in found) / 8, rel=1e-12)


def _share(world: World) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """In one rank: rows, summed gradients and summed statistics; the last rank has a row of padding."""
    made, per = stem(), -(-5 // world.size)
    rows = slice(world.rank * per, (world.rank + 1) * per)
    mine = images()[rows]
    real = torch.arange(per) < len(mine)
    mine = torch.cat([mine, torch.full((per - len(mine), 3, 16, 8), 7.0, dtype=torch.float64)])
    out = made(mine, real)
    (out[real].square() * torch.arange(1, 13)).sum().backward()
    gradients = {name: all_reduce(value.grad) for name, value in made.named_parameters() if value.grad is not None}
    sums = take_statistics(made, real.double().sum() / 5)
    return out[real].detach(), gradients, {name: all_reduce(value) for name, value in sums.items()}


@pytest.mark.slow
def test_ranks__rows_gradients_and_statistics_are_those_of_one_process() -> None:
    rows, gradients, statistics = run_ranks(1, _share)[0]
    for world in (2, 3):
        found = run_ranks(world, _share)
        torch.testing.assert_close(torch.cat([part for part, _, _ in found]), rows, rtol=0, atol=1e-12)
        for _, theirs, sums in found:
            for name, value in gradients.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-9, msg=name)
            for name, value in statistics.items():
                torch.testing.assert_close(sums[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("arch", "millions", "classifier"), [
    ("vit_small", 23.39, 384 * 1000 + 1000), ("vit_base", 89.15, 768 * 1000 + 1000),
])  # fmt: skip
def test_backbone__sizes_are_the_published_ones(arch: str, millions: float, classifier: int) -> None:
    """Published with an unused classifier of 1 000 classes: two more keys, 174 in all."""
    with torch.device("meta"):
        backbone = VisionTransformer(BackboneConfig(arch=arch, stem="ics"))  # type: ignore[arg-type]
    assert len(backbone.state_dict()) == 172
    assert (parameter_count(backbone) + classifier) / 1e6 == pytest.approx(millions, abs=0.006)
    assert backbone.depth_of("patch_embed.conv.0.weight") == 0


def test_bf16__norms_stay_float32() -> None:
    made = stem().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(images().float())
    assert {value.dtype for value in take_statistics(made, torch.tensor(1.0)).values()} == {torch.float32}
