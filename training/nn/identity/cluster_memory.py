"""The memory of cluster centroids that images are compared with (cluster-contrast-reid `clustercontrast/models/cm.py`).

Shapes: B images, N images of the global batch in the order of the stream, K clusters, F channels of the feature.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

UpdateRule = Literal["hardest", "each"]


def centroids(features_NF: Tensor, label_N: Tensor) -> Tensor:
    """[K, F]: the mean of each cluster's features, normalised. Labels number the clusters from 0; negative ones (noise)
    take no part."""
    in_cluster = label_N >= 0
    labels, features = label_N[in_cluster], features_NF[in_cluster]
    counts = torch.bincount(labels)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return F.normalize(sums / counts[:, None], dim=1)


def contrast(unit_BF: Tensor, label_B: Tensor, memory_KF: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(cross-entropy [B] over all clusters, logits [B, K]) of normalised features; no gradient reaches the memory.

        logits[b, k] = u_b . m_k / temperature

    The loss of an image without a cluster (label -1) is 0.
    """
    logits_BK = unit_BF @ memory_KF.detach().T / temperature
    return F.cross_entropy(logits_BK, label_B, reduction="none", ignore_index=-1), logits_BK


@torch.no_grad()
def updated(memory_KF: Tensor, unit_NF: Tensor, label_N: Tensor, *, momentum: float, rule: UpdateRule) -> Tensor:
    """The memory after a global batch [N, F] of normalised features, in its order; rows of label -1 take no part.

    "hardest": the image of each cluster that is least like the memory as it was replaces 1 - `momentum` of it
    (`CM_Hard`). "each": all images do, one after the other (`CM`). Rows are normalised after each replacement; clusters
    without an image stay.
    """
    unit_NF = unit_NF.to(memory_KF)
    if rule == "hardest":
        hardest_KF, has_K = _hardest(memory_KF, unit_NF, label_N)
        moved_KF = F.normalize(momentum * memory_KF + (1 - momentum) * hardest_KF, dim=1)
        return torch.where(has_K[:, None], moved_KF, memory_KF)
    memory = memory_KF.clone()
    for row, cluster in zip(unit_NF, label_N.tolist(), strict=True):
        if cluster >= 0:
            memory[cluster] = F.normalize(momentum * memory[cluster] + (1 - momentum) * row, dim=0)
    return memory


def _hardest(memory_KF: Tensor, unit_NF: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [K, F], whether there is one [K]): of each cluster in the batch the image with the smallest dot product, of
    equals the first. No size depends on the values, so that a GPU need not be waited for."""
    clusters, images = len(memory_KF), len(unit_NF)
    real_N, label_N = label_N >= 0, label_N.clamp(min=0)
    likeness_N = (unit_NF * memory_KF[label_N]).sum(dim=1).masked_fill(~real_N, torch.inf)
    least_K = likeness_N.new_full((clusters,), torch.inf).scatter_reduce(0, label_N, likeness_N, "amin")
    is_least_N = real_N & (likeness_N == least_K[label_N])
    place_N = torch.arange(images, device=label_N.device)
    first_K = place_N.new_full((clusters,), images).scatter_reduce(
        0, label_N, torch.where(is_least_N, place_N, images), "amin"
    )
    return unit_NF[first_K.clamp(max=images - 1)], first_K < images
