"""Cross-entropies between what the teacher says and the student: of different views, or of one view's hidden patches.

Shapes: S student views, T teacher views (the first T student views are of the same crops), G global views, B images,
N patches, K prototypes, M pairs of different views, R hidden patches of all views and images.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED = 1 << 18
"""Numbers that are worked on at a time on a CPU, so that what is read again is still in its cache."""


def pair_cross_entropies(student_SBK: Tensor, targets_TBK: Tensor, *, student_temp: float) -> Tensor:
    """Cross-entropy of every pair of different views, image by image: [M, B], M = T * S - min(T, S).

    The trunk shared by DINO, PASS and PersonViT (TransReID-SSL `dino/main_dino.py` DINOLoss, PASS `PASS/main_pass.py`
    DINOLoss); each chooses its own average over the pairs.

        for t in teacher views:
            for s in student views, s != t:
                H[m, b] = - sum over k of targets[t, b, k] * log softmax(student[s, b] / student_temp)[k]

    `targets_TBK` are probabilities, without gradient.
    """
    crossed_TSB: Tensor = _CrossEntropies.apply(student_SBK, targets_TBK, student_temp)
    teachers, students = crossed_TSB.shape[:2]
    same = min(teachers, students) - 1
    # after the first, a pair of a view with itself stands at every (students + 1)th place
    flat = crossed_TSB.flatten(0, 1)[1:]
    between = flat[: same * (students + 1)].unflatten(0, (same, students + 1))[:, :students]
    return torch.cat([between.flatten(0, 1), flat[same * (students + 1) :]])


class _CrossEntropies(torch.autograd.Function):
    """Cross-entropies of all views with all targets: [T, S, B]. Keeps softmax and targets, nothing as large beside.

    z = student / temperature - its largest over k
    H[t, s, b] = log(sum over k of exp z[s, b, k]) - sum over k of targets[t, b, k] * z[s, b, k]
    dH[t, s, b] / dstudent[s, b] = (softmax(z[s, b]) - targets[t, b]) / temperature
    """

    @staticmethod
    def forward(context: Any, student_SBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
        chances_SBK = torch.empty_like(student_SBK, memory_format=torch.contiguous_format)
        crossed_TSB = student_SBK.new_empty(len(targets_TBK), *student_SBK.shape[:2])
        for views, images in _stretches(student_SBK):
            z = torch.div(student_SBK[views, images], temperature, out=chances_SBK[views, images])
            z.sub_(z.amax(dim=-1, keepdim=True))
            crossed = torch.einsum("tbk,sbk->tsb", targets_TBK[:, images], z)
            sums = z.exp_().sum(dim=-1, keepdim=True)
            torch.sub(sums[..., 0].log(), crossed, out=crossed_TSB[:, views, images])
            z.div_(sums)
        context.save_for_backward(chances_SBK, targets_TBK)
        context.temperature = temperature
        return crossed_TSB

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_TSB: Tensor) -> tuple[Tensor, None, None]:
        """In the memory of the softmax, so once only."""
        result_SBK, targets_TBK = context.saved_tensors
        owed_TSB1 = (gradient_TSB / context.temperature)[..., None]
        all_SB1 = owed_TSB1.sum(dim=0)
        for views, images in _stretches(result_SBK):
            part = result_SBK[views, images].mul_(all_SB1[views, images])
            for target_BK, owed_SB1 in zip(targets_TBK[:, images], owed_TSB1[:, views, images], strict=True):
                part.addcmul_(target_BK, owed_SB1, value=-1)
        return result_SBK, None, None


def _stretches(values_SBK: Tensor) -> Iterator[tuple[slice, slice]]:
    """(views, images) that are worked on at a time: all of them on a GPU, where every stretch is a launch."""
    views, images, prototypes = values_SBK.shape
    if values_SBK.device.type != "cpu":
        yield slice(None), slice(None)
        return
    count = max(1, CACHED // prototypes)
    for start in range(0, images, count):
        for view in range(views):
            yield slice(view, view + 1), slice(start, start + count)


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
    crossed_R: Tensor = _CrossEntropies.apply(student_RK[None], targets_RK[None], student_temp)[0, 0]
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
