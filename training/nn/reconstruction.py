"""What a masked auto-encoder predicts of an image's patches, and how far off it is.

Formulas of MAE (He et al., CVPR 2022; reference `models_mae.py` patchify, forward_loss) and of BootMAE (Dong et al.,
ECCV 2022; reference `run_pretraining.py` train_one_epoch).

Shapes: B images, I = 3 channels, H x W pixels, N patches (row-major) on a grid of R rows and G columns, V = patch *
patch * 3 values of a patch (inner order: row, column, channel), C channels of a feature.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelNorm = Literal["none", "mae", "bootmae"]
"""How the values of a patch are standardised. "none": not at all; "mae": over all its values, unbiased variance +
1e-6; "bootmae": each channel by itself, biased variance + 1e-5."""


def patchify(images_BIHW: Tensor, patch: int) -> Tensor:
    """Images in patches: [B, N, V].

    patches[b, r * columns + g, (y * patch + x) * 3 + i] = images[b, i, r * patch + y, g * patch + x]
    """
    batch, channels, height, width = images_BIHW.shape
    rows, columns = height // patch, width // patch
    grid = images_BIHW.reshape(batch, channels, rows, patch, columns, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def pixel_target(images_BIHW: Tensor, patch: int, norm: PixelNorm) -> Tensor:
    """The pixels to predict, patch by patch: [B, N, V].

    "mae":      (x - mean) / sqrt(sum of (x - mean)^2 / (V - 1) + 1e-6), over the V values of a patch
    "bootmae":  (x - mean) / sqrt(sum of (x - mean)^2 / (V / 3) + 1e-5), over the V / 3 values of a channel
    """
    patches_BNV = patchify(images_BIHW, patch)
    if norm == "none":
        return patches_BNV
    if norm == "mae":
        variance, mean = torch.var_mean(patches_BNV, dim=-1, keepdim=True)
        return (patches_BNV - mean) / (variance + 1e-6).sqrt()
    channels = images_BIHW.shape[1]
    values = patches_BNV.unflatten(-1, (-1, channels))
    variance, mean = torch.var_mean(values, dim=-2, keepdim=True, correction=0)
    return ((values - mean) / (variance + 1e-5).sqrt()).flatten(-2)


def pixel_errors(predicted_BNV: Tensor, target_BNV: Tensor) -> Tensor:
    """Mean squared error of each patch: [B, N]."""
    return (predicted_BNV - target_BNV).square().mean(dim=-1)


def feature_errors(predicted_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """Mean squared error of each patch's feature, both standardised first: [B, N].

    error[b, n] = (1 / C) * sum over c of (norm(target)[c] - norm(predicted)[c])^2
    """
    return (standardised(predicted_BNC) - standardised(target_BNC)).square().mean(dim=-1)


def standardised(features: Tensor) -> Tensor:
    """Layer norm without learned parameters, eps 1e-6, over the last axis."""
    return F.layer_norm(features, features.shape[-1:], eps=1e-6)


def centre_weights(mask_BRG: Tensor) -> Tensor:
    """How much each patch counts when the middle of masked blocks, hardest to guess, is to count double: [B, R, G].

    weight[b, r, g] = mask[b, r, g] * (1 + (1 / 9) * sum of mask over the 3 x 3 neighbourhood, 0 beyond the edge)
    """
    around_BRG = F.avg_pool2d(mask_BRG[:, None], 3, stride=1, padding=1)[:, 0]
    return mask_BRG * around_BRG + mask_BRG


def over_patches(errors_BN: Tensor, weight_BN: Tensor, count: float | Tensor) -> Tensor:
    """The loss of each image: [B]. `count`: patches that an image's loss is about, on the average of the batch.

        loss[b] = sum over n of weight[b, n] * errors[b, n] / count

    Its mean over the images is the references' loss: MAE's over all masked patches of a batch with `count` = masked
    patches / B, and BootMAE's mean(weight * errors) / mean(mask).
    """
    return (weight_BN * errors_BN).sum(dim=-1) / count
