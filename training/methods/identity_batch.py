"""A micro-batch as methods that learn identities or pseudo-identities take it: images erased, labels, drop path.

Shapes: B images of this process, H x W pixels, D blocks of the backbone.
"""

import math
from typing import NamedTuple

from torch import Tensor

from training.methods.base import TrainingProgress, Views
from training.nn.drop_path import Paths, draw_path_masks, on_device
from training.nn.identity.random_erasing import Erasing, erase
from training.nn.vision_transformer import BackboneConfig, VisionTransformer


class IdentityBatch(NamedTuple):
    """What the network sees of a micro-batch, and what it should say; all on the device of the images."""

    images_BIHW: Tensor
    """Whole images, some with a rectangle erased."""
    label_B: Tensor
    """int64; -1: padding, or an image that has none."""
    real_B: Tensor
    """bool; False: padding."""
    path_masks: Paths
    """What drop path leaves of the backbone's blocks; None: all."""


def identity_batch(
    views: Views, progress: TrainingProgress, *, backbone: VisionTransformer, erasing: Erasing, probability: float
) -> IdentityBatch:
    """The batch of the views "image", a function of the run's seed and the images' positions. `backbone`:
    whose blocks are dropped; `erasing`: what takes the place of the rectangles that the loader has drawn;
    `probability`: share of images that lose one; 0: none was drawn."""
    position_B, real_B = views["position"], views["weight"] > 0
    label_B = views["label"].to(real_B.device).masked_fill(~real_B, -1)
    images_BIHW = views["image"][0]
    if probability:
        images_BIHW = erase(images_BIHW, views["erased"], views["noise"], erasing.fill)
    rates, purpose = backbone.config.drop_rates, "drop_path/image"
    drawn = draw_path_masks(rates, seed=progress.seed, purpose=purpose, position=position_B, views=1)
    (path_masks,) = on_device([drawn], images_BIHW.device, whole=backbone.compiled)
    return IdentityBatch(images_BIHW, label_B, real_B, path_masks)


def erased_numbers(backbone: BackboneConfig, images: int, probability: float) -> int:
    """How many numbers images with rectangles erased take, beside the batch."""
    return images * 3 * math.prod(backbone.size) if probability else 0
