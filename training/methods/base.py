"""What a pre-training method is. The engine knows this file and never a method's name.

Shapes: V views of one kind, B images of a micro-batch, H x W pixels, C channels of the backbone, P part tokens,
N patches.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypedDict

from torch import Tensor, nn

from datapipe.core.config import ViewConfig
from datapipe.views.spec import ViewSpec
from training.core.precision import Precision
from training.nn.vision_transformer import BackboneConfig, VisionTransformer

Views = TypedDict(
    "Views",
    {
        "global": Tensor,  # [V, B, 3, H, W], normalised
        "local": Tensor,  # [V, B, 3, H, W]
        "region_a": Tensor,  # [V, B, 3, H, W]
        "region_b": Tensor,  # [V, B, 3, H, W]
        "image": Tensor,  # [1, B, 3, H, W]: the whole person
        "mask": Tensor,  # [V, B, rows, columns] bool, True: hidden from the student
        "hidden": Tensor,  # [R] int64: where the mask is True, counted over all of it in order
        "boxes": Tensor,  # [V, B, 5] int64: top, left, height, width in the source image, flipped; 0 for padding
        "sample": Tensor,  # [B] int64: row of the data set; -1 marks padding
        "position": Tensor,  # [B] int64: place in the stream, unique even where a sample repeats; stays on the host
        "label": Tensor,  # [B] int64, where known; numbered from 0 for methods that batch by identity
        "camera": Tensor,  # [B] int64, where known
        "weight": Tensor,  # [B]: 1 / real images of the GLOBAL batch; 0 marks padding
    },
    total=False,
)
"""The named image stacks of one micro-batch, view axis first, and where its images come from."""


class Progress(NamedTuple):
    """Where the run stands before a step. Everything that changes with time is a function of this."""

    samples: int
    """Images seen before this batch."""
    step: int
    """Optimizer steps done before this one."""
    epoch: int
    """Whole passes over the data set behind us."""
    fraction: float
    """Share of the whole run behind us, 0 to 1."""
    total_steps: int
    epoch_steps: float
    """Steps of one epoch; not whole when the batch does not divide the data set."""
    seed: int


class Outcome(NamedTuple):
    """What one micro-batch gives. All of it adds up over micro-batches and ranks."""

    loss: Tensor
    """sum over b of weight[b] * loss of image b."""
    sums: dict[str, Tensor]
    """What centres and memories need, weighted in the same way."""
    metrics: dict[str, Tensor]
    """Detached, [B] each; the house forms the weighted means."""


class Role(NamedTuple):
    """How the optimizer treats one parameter."""

    decay: bool
    """Does weight decay apply?"""
    depth: int
    """For layer decay. 0: tokens, positions, patch embedding; i + 1: block i; number of blocks + 1: all after them."""
    lr_factor: float = 1.0
    release_epoch: int = 0
    """Before this epoch the parameter has no gradient: no step, no decay, no moments."""


class ByIdentity(NamedTuple):
    """How a method that learns from identities wants its batches."""

    instances: int
    """Images of each identity, side by side."""
    fraction: float
    """Share of the identities that takes part."""


class Method(nn.Module, ABC):
    """One objective: a `student` the optimizer sees, maybe a `teacher` only the moving average touches, and their loss.

    Both are submodules with the attributes `backbone` and `head`. A method without a teacher does not define it.
    """

    student: nn.Module
    teacher: nn.Module

    def __init__(self, config: Any, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "fp32"

    @staticmethod
    @abstractmethod
    def views(config: Any, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        """What the loader must make; picklable."""

    @staticmethod
    def by_identity(config: Any) -> ByIdentity | None:
        """How batches are made up of identities; None: they are not, and labels are not needed. The settings of a
        method that asks for it have a field `classes`, which takes their number."""
        del config
        return None

    @abstractmethod
    def forward(self, views: Views, progress: Progress) -> Outcome:
        """The loss of one micro-batch: all views, student and teacher, in one call."""

    def after_step(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """Once per optimizer step, on every rank, with the sums of the global batch: centres, memories."""
        del sums, progress

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Per trainable parameter, by its name in `named_parameters()`."""

    @abstractmethod
    def backbone(self) -> VisionTransformer:
        """The network that is evaluated and exported."""

    def couples_batch(self) -> bool:
        """Do the targets of one image depend on the others of its micro-batch?

        Then the same batch in another number of micro-batches has another loss, so gradients must not be accumulated.
        """
        return False
