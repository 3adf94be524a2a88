"""Cross-entropies between what the teacher says and the student: of different views, or of one view's hidden patches.

Shapes: S student views, T teacher views (the first T student views are of the same crops), G global views, B images,
N patches, K prototypes, M pairs of different views, R hidden patches of all views and images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_cross_entropies(student_SBK: Tensor, targets_TBK: Tensor, *, student_temp: float) -> Tensor:
    """Cross-entropy of every pair of different views, image by image: [M, B], M = T * S - min(T, S).

    The trunk shared by DINO, PASS and PersonViT (TransReID-SSL `dino/main_dino.py` DINOLoss, PASS `PASS/main_pass.py`
    DINOLoss); each chooses its own average over the pairs.

        for t in teacher views:
            for s in student views, s != t:
                H[m, b] = - sum over k of targets[t, b, k] * log softmax(student[s, b] / student_temp)[k]

    `targets_TBK` are probabilities, without gradient.
    """
    log_student_SBK = F.log_softmax(student_SBK / student_temp, dim=-1)
    crossed_TSB = -torch.einsum("tbk,sbk->tsb", targets_TBK, log_student_SBK)
    teachers, students = crossed_TSB.shape[:2]
    return torch.stack([crossed_TSB[t, s] for t in range(teachers) for s in range(students) if s != t])


def hidden_patch_cross_entropies(
    student_RK: Tensor, targets_RK: Tensor, mask_GBN: Tensor, *, student_temp: float, hidden_R: Tensor | None = None
) -> Tensor:
    """Mean over the views of the mean over the hidden patches of a view, image by image: [B].

    The patch term of iBOT (`main_ibot.py` iBOTLoss.forward). Rows are in the order of `mask_GBN.nonzero()`;
    `hidden_R` as in `mean_over_hidden`. A view without hidden patches adds nothing, but counts:

        loss[b] = (1 / G) * sum over g of
                  (sum over hidden n of H[g, b, n]) / max(1, number of hidden n of g, b)
        H = - sum over k of targets[k] * log softmax(student / student_temp)[k]
    """
    crossed_R = -(targets_RK * F.log_softmax(student_RK / student_temp, dim=-1)).sum(dim=-1)
    return mean_over_hidden(crossed_R, mask_GBN, hidden_R)


def hidden_numbers(mask: Tensor) -> Tensor:
    """Where a mask is True, counted over all of it in order: [R] int64. On a GPU the host waits for the count; a batch
    has these numbers from the loader, as `hidden`."""
    return mask.flatten().nonzero()[:, 0]


def mean_over_hidden(values_R: Tensor, mask_GBN: Tensor, hidden_R: Tensor | None = None) -> Tensor:
    """Mean over views of the mean over each view's hidden patches, 0 where there is none: [B].

    `hidden_R`: `hidden_numbers` of the mask where they are known; None: they are counted here.
    """
    hidden_R = hidden_numbers(mask_GBN) if hidden_R is None else hidden_R
    values_GBN = values_R.new_zeros(mask_GBN.numel()).index_copy(0, hidden_R, values_R).view(mask_GBN.shape)
    return (values_GBN.sum(dim=-1) / mask_GBN.sum(dim=-1).clamp(min=1)).mean(dim=0)


def entropy(probabilities: Tensor) -> Tensor:
    """- sum over the last axis of p log p, in nats; ln K when uniform."""
    return torch.special.entr(probabilities).sum(dim=-1)
