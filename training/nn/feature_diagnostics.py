"""What a run is watched by: how much targets and features still say of an image.

The course of it is judged by `training/trainer/monitoring/collapse.py`.

Every measure is recorded per image, [B], though it compares the real images of a micro-batch. Shapes: T teacher views,
B images, K prototypes, R rows of any kind, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.core.precision import at_least_float32


def cosine_to_others(features_BC: Tensor, weight_B: Tensor) -> Tensor:
    """Mean cosine of each image with the other real images of its micro-batch: [B]; 0 where there is no other.

    cosine[b] = (1 / (n - 1)) * sum over real b' != b of <f[b], f[b']> / (|f[b]| |f[b']|)
    """
    real_B1 = (weight_B > 0)[:, None]
    unit_BC = F.normalize(at_least_float32(features_BC), dim=-1) * real_B1
    others = (real_B1.sum() - 1).clamp(min=1)
    return ((unit_BC @ unit_BC.sum(dim=0)) - real_B1[:, 0].to(unit_BC.dtype)) / others


def participation(features_BC: Tensor, weight_B: Tensor) -> Tensor:
    """In how many directions the real images of a micro-batch differ, the same number for each of them: [B].

    The participation ratio of the eigenvalues e of their covariance, from 1 (one direction) to min(C, images - 1) (all
    alike); 0 where the images do not differ at all. Needs no decomposition: with the Gram matrix G of the centred
    features,

        (sum of e)^2 / sum of e^2 = trace(G)^2 / sum over b, b' of G[b, b']^2
    """
    real_B1 = (weight_B > 0).to(features_BC.dtype)[:, None]
    mean_C = (features_BC * real_B1).sum(dim=0) / real_B1.sum().clamp(min=1)
    centred_BC = at_least_float32((features_BC - mean_C) * real_B1)
    gram_BB = centred_BC @ centred_BC.T
    tiny = 1e-30
    ratio = gram_BB.trace().square() / gram_BB.square().sum().clamp(min=tiny)
    return ratio.expand(len(features_BC))


def information(targets_TBK: Tensor, weight_B: Tensor) -> Tensor:
    """How much the targets say of which image they are for: [B], nats. 0 where all images have the same, sharp or not.

    Its mean is the mutual information of image and prototype, at most ln K and ln of the real images:

        p[b] = mean over t of targets[t, b];  m = mean over real b of p[b]
        information[b] = sum over k of p[b, k] * ln(p[b, k] / m[k])
    """
    real_B1 = (weight_B > 0).to(targets_TBK.dtype)[:, None]
    said_BK = targets_TBK.mean(dim=0) * real_B1
    mean_K = said_BK.sum(dim=0) / real_B1.sum().clamp(min=1)
    return (torch.special.xlogy(said_BK, said_BK) - torch.special.xlogy(said_BK, mean_K)).sum(dim=-1)


def of_features(features_BC: Tensor, weight_B: Tensor) -> dict[str, Tensor]:
    """What every method records of the teacher's features of an image.

    feature_cosine: with those of other images; near 1 when all look alike
    feature_rank:   in how many directions images differ, from 1
    images_compared: real images of the micro-batch; the two say nothing of one or two
    """
    return {
        "feature_cosine": cosine_to_others(features_BC, weight_B),
        "feature_rank": participation(features_BC, weight_B),
        "images_compared": (weight_B > 0).sum().to(features_BC.dtype).expand(len(weight_B)),
    }
