"""Losses that compare the images of a batch with one another, for fine-tuning on identities.

Shapes: A anchors, images of this process; N images of the whole batch, the anchors among them; C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SQUARE = 1e-12
"""Squared distances below this count as this: the root has no slope at zero. An image is 1e-6 away from itself."""


def distances(anchors_AC: Tensor, features_NC: Tensor) -> Tensor:
    """Euclidean distances [A, N], from the expanded square as in TransReID `loss/triplet_loss.py` euclidean_dist.

    d[a, n] = sqrt(max(LEAST_SQUARE, |anchor a|^2 + |feature n|^2 - 2 anchor a . feature n))
    """
    squares_A1 = anchors_AC.square().sum(dim=1, keepdim=True)
    squares_N = features_NC.square().sum(dim=1)
    return (squares_A1 + squares_N - 2 * anchors_AC @ features_NC.T).clamp(min=LEAST_SQUARE).sqrt()


def hardest(distances_AN: Tensor, anchor_A: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the largest distance to an image of its identity (itself included) and the smallest to one of
    another identity: [A] both.

    `anchor_A`, `label_N`: identities; images of negative identity, unknown or padding, are nobody's positive or
    negative. An anchor without negative has one at infinity; what is said of an anchor of negative identity means
    nothing.
    """
    same_AN = (anchor_A[:, None] == label_N) & (label_N >= 0)
    other_AN = (anchor_A[:, None] != label_N) & (label_N >= 0)
    positive_A = distances_AN.masked_fill(~same_AN, 0.0).amax(dim=1)
    negative_A = distances_AN.masked_fill(~other_AN, torch.inf).amin(dim=1)
    return positive_A, negative_A


def triplet(positive_A: Tensor, negative_A: Tensor, margin: float = 0.0) -> Tensor:
    """Loss of each anchor, [A] (TransReID `loss/triplet_loss.py` TripletLoss).

    margin = 0: log(1 + exp(positive - negative)), the soft margin;  else max(0, margin + positive - negative)
    """
    excess_A = positive_A - negative_A
    return F.relu(excess_A + margin) if margin else F.softplus(excess_A)


def identity(logits_AK: Tensor, label_A: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each image with its identity, [A]; 0 where that is negative.

    `smoothing` of the target is spread over all K identities, the right one included.
    """
    return F.cross_entropy(logits_AK, label_A.clamp(min=0), reduction="none", label_smoothing=smoothing) * (
        label_A >= 0
    )
