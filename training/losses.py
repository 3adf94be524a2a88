"""Cross-entropies between what the teacher says of one view and the student of another.

Shapes: S student views, T teacher views (the first T student views are of the same crops), B images, K prototypes,
M pairs of different views.
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


def entropy(probabilities: Tensor) -> Tensor:
    """- sum over the last axis of p log p, in nats; ln K when uniform."""
    return torch.special.entr(probabilities).sum(dim=-1)
