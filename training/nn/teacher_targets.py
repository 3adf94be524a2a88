"""From teacher logits to targets: centring (DINO) or Sinkhorn (SwAV). No gradient flows here.

Shapes: T teacher views, B images, K prototypes.
"""

import torch
from torch import Tensor, distributed

from training.core.collectives import all_reduce


def centred(teacher_TBK: Tensor, centre_1K: Tensor, *, temperature: float) -> Tensor:
    """softmax((teacher - centre) / temperature) over K. TransReID-SSL `dino/main_dino.py` DINOLoss.forward."""
    return torch.softmax((teacher_TBK - centre_1K) / temperature, dim=-1)


def centre_sum(teacher_TBK: Tensor, weight_B: Tensor) -> Tensor:
    """This micro-batch's share of the mean raw logits over all views and real images of the global batch: [1, K].

        sum over b of weight[b] * (1 / T) * sum over t of teacher[t, b]

    The weights of the global batch add up to one, so the shares of micro-batches and ranks just add.
    """
    return torch.einsum("tbk,b->k", teacher_TBK, weight_B.to(teacher_TBK.dtype))[None] / len(teacher_TBK)


def move_centres(centres_1K: list[Tensor], means_1K: list[Tensor], momenta: list[float]) -> None:
    """The centres for the next step, in place. They change after the loss, so step n uses the logits of the steps
    before n.

    centre = centre * momentum + mean * (1 - momentum), each with its own K and momentum
    """
    arriving = [mean.to(centre) for centre, mean in zip(centres_1K, means_1K, strict=True)]
    torch._foreach_mul_(centres_1K, momenta)
    torch._foreach_add_(centres_1K, torch._foreach_mul(arriving, [1 - momentum for momentum in momenta]))


def sinkhorn(teacher_TBK: Tensor, weight_B: Tensor, *, temperature: float, iterations: int = 3) -> Tensor:
    """Targets that use every prototype about equally often over the teacher rows of all ranks (SwAV, algorithm 1).

        Q = exp(teacher / temperature)
        iterations times:
            Q[:, :, k] /= sum of Q[:, :, k] over all rows (views, images, ranks; padding left out)
            Q[t, b, :] /= sum of Q[t, b, :] over k

    Computed on logarithms, so that low temperatures neither overflow nor leave a prototype without mass. Two small
    collectives per iteration; every rank must call it.
    """
    log_q_TBK = teacher_TBK / temperature
    padding_1B1 = (weight_B == 0)[None, :, None]
    for _ in range(iterations):
        log_q_TBK = log_q_TBK - _log_sum_over_rows(log_q_TBK.masked_fill(padding_1B1, -torch.inf))
        log_q_TBK = log_q_TBK - log_q_TBK.logsumexp(dim=-1, keepdim=True)
    return log_q_TBK.exp()


def _log_sum_over_rows(log_q_TBK: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all ranks: [K]. A rank may have no rows at all (no hidden patches)."""
    none_1K = log_q_TBK.new_full((1, log_q_TBK.shape[-1]), -torch.inf)
    largest_K = torch.cat([log_q_TBK.flatten(0, 1), none_1K]).amax(dim=0)
    all_reduce(largest_K, distributed.ReduceOp.MAX)
    sum_K = (log_q_TBK - largest_K).exp().sum(dim=(0, 1))
    all_reduce(sum_K)
    return largest_K + sum_K.log()
