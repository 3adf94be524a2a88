"""The convolutional stem of TransReID-SSL (ICS: IBN-based convolution stem, `dino/ours_vit.py` PatchEmbed_VOLO).

Key names are the reference's. Batch statistics are pooled over the real images of all ranks, one resolution at a time:
SyncBatchNorm refuses CPU tensors, and padding must not count.

Shapes: B images, H x W pixels, C channels, N patches, V calls of a norm in one step.
"""

import torch
from torch import Tensor, nn

from training.core.collectives import sum_over_ranks
from training.core.precision import at_least_float32

CHANNELS = 64
"""Channels of all convolutions before the last."""
EPS = 1e-5
MOMENTUM = 0.1
"""Share of the batch's statistics in the running ones."""
SUMS = "batch_norm/"
"""How the names begin under which fresh statistics travel in `Outcome.sums`."""


class ConvStem(nn.Module):
    """Three convolutions at half the resolution, then patches of half the size: [B, 3, H, W] -> [B, N, C]."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        half = CHANNELS
        self.conv = nn.Sequential(
            nn.Conv2d(3, half, 7, stride=2, padding=3, bias=False), SplitNorm(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False), SplitNorm(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False), PooledBatchNorm(half), nn.ReLU(),
        )  # fmt: skip
        self.proj = nn.Conv2d(half, width, patch // 2, stride=patch // 2)

    def forward(self, images: Tensor, real_B: Tensor | None = None) -> Tensor:
        """`real_B`: False where an image is padding, which stays out of the batch statistics. None: all are real."""
        values = images
        for layer in self.conv:
            normal = isinstance(layer, SplitNorm | PooledBatchNorm)
            values = layer(values, real_B) if normal else layer(values)
        patches: Tensor = self.proj(values)
        return patches.flatten(2).transpose(1, 2)


class SplitNorm(nn.Module):
    """IBN: instance norm for the first half of the channels, batch norm for the second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.instances = channels // 2
        self.IN = nn.InstanceNorm2d(self.instances, eps=EPS, affine=True)
        self.BN = PooledBatchNorm(channels - self.instances)

    def forward(self, values: Tensor, real_B: Tensor | None) -> Tensor:
        values = at_least_float32(values)
        return torch.cat([self.IN(values[:, : self.instances]), self.BN(values[:, self.instances :], real_B)], dim=1)


class PooledBatchNorm(nn.Module):
    """Batch norm with the statistics of the real images of all ranks; in evaluation with the running ones.

    A forward pass leaves the running statistics as they are: it notes what it saw, `take_statistics` hands that to
    the step, and `settle` moves them once the step is done. So a rehearsal or a refused step leaves no trace.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group = 0
    """Neighbours of the batch that are normalised together; 0: all images of all ranks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.fresh: list[Tensor] = []

    def forward(self, values: Tensor, real_B: Tensor | None) -> Tensor:
        values = at_least_float32(values)
        if not self.training:
            return self._normalised(values, self.running_mean, self.running_var)
        count, mean, variance = pooled_statistics(values, real_B)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.fresh.append(torch.stack([mean, unbiased]).detach())
        return self._normalised(values, mean, variance)

    def _normalised(self, values: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        scale_C = self.weight * torch.rsqrt(variance_C + EPS)
        shift_C = self.bias - mean_C * scale_C
        return values * scale_C[:, None, None] + shift_C[:, None, None]


def pooled_statistics(values_BCHW: Tensor, real_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(values per channel, mean [C], biased variance [C]) over the real images of all ranks, with gradient.

    mean[c] = (1 / n) * sum over ranks, real b, h, w of x[b, c, h, w];  variance likewise of (x - mean)^2
    """
    images, channels, height, width = values_BCHW.shape
    weight_B = values_BCHW.new_ones(images) if real_B is None else real_B.to(values_BCHW.dtype)
    sums_C = torch.einsum("bchw,b->c", values_BCHW, weight_B)
    whole = sum_over_ranks(torch.cat([sums_C, (weight_B.sum() * height * width)[None]]))
    count, mean_C = whole[channels].detach(), whole[:channels] / whole[channels].detach()
    squares_BC = (values_BCHW - mean_C[:, None, None]).square().sum(dim=(2, 3))
    variance_C = sum_over_ranks(torch.einsum("bc,b->c", squares_BC, weight_B)) / count
    return count, mean_C, variance_C


def take_statistics(module: nn.Module, share: Tensor, *, first: Tensor | None = None) -> dict[str, Tensor]:
    """What the norms of `module` saw since last asked, [V, 2, C] each, times this micro-batch's share of the batch.
    Norms by groups of the batch (`group`) give what the first of them saw, times `first` [1]: 1 where that is in this
    micro-batch, else 0; None: it is."""
    statistics = {}
    for name, layer in module.named_modules():
        if isinstance(layer, PooledBatchNorm) and layer.fresh:
            fresh = torch.stack(layer.fresh)
            part = (fresh.new_ones(1) if first is None else first) if layer.group else share
            statistics[f"{SUMS}{name}"] = fresh * part
            layer.fresh.clear()
    return statistics


@torch.no_grad()
def settle(module: nn.Module, sums: dict[str, Tensor]) -> None:
    """Move the running statistics towards those of a step, resolution after resolution."""
    for name, seen_V2C in sums.items():
        if name.startswith(SUMS):
            layer = module.get_submodule(name.removeprefix(SUMS))
            assert isinstance(layer, PooledBatchNorm)
            for mean_C, variance_C in seen_V2C.to(layer.running_mean):
                layer.running_mean.lerp_(mean_C, MOMENTUM)
                layer.running_var.lerp_(variance_C, MOMENTUM)
                layer.num_batches_tracked += 1
