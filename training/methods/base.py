"""What a pre-training method is. The engine knows this file and never a method's name.

Shapes: V views of one kind, B images of a micro-batch, H x W pixels, C channels of the backbone, P part tokens,
N patches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypedDict, TypeVar, get_args

import numpy as np
from torch import Tensor, nn

from datapipe.core.config import ViewConfig
from datapipe.core.settings import settings
from datapipe.views.spec import ViewSpec
from training.clustering.settings import ClusteringConfig
from training.core.precision import Precision
from training.nn.identity.fusion import FEATURES, Fusion
from training.nn.identity.necks import NeckedBackbone, TokenNecks
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Stack, Workload

SIZES = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl"}
"""Architecture -> how the names of its recipes end."""


@settings
class MethodSettings:
    """What the settings of every method have. A method's own class gives `name` a `Literal` with its default."""

    name: str = ""
    """The method."""


C = TypeVar("C", bound=MethodSettings)
"""The settings of a method."""

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
        "erased": np.ndarray,  # [B, 4] int64: top, left, height, width to be erased, on the host; height 0: nothing
        "noise": Tensor,  # [R]: what takes the place of these rectangles, one behind the other, where it is noise
        "sample": Tensor,  # [B] int64: row of the data set; -1 marks padding
        "position": Tensor,  # [B] int64: place in the stream, unique even where a sample repeats; stays on the host
        "label": Tensor,  # [B] int64, where known; numbered from 0 for methods that batch by identity
        "camera": Tensor,  # [B] int64, where known
        "weight": Tensor,  # [B]: 1 / real images of the GLOBAL batch; 0 marks padding
    },
    total=False,
)
"""The named image stacks of one micro-batch, view axis first, and where its images come from."""


class TrainingProgress(NamedTuple):
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
    batch: int = 0
    """Images of a whole global batch."""


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


class ByCluster(NamedTuple):
    """How a method that learns from pseudo labels has them made at the start of every epoch, and wants its batches."""

    clustering: ClusteringConfig
    instances: int
    """Images of each cluster, side by side."""
    iterations: int
    """Steps of an epoch."""
    cameras: bool
    """Does a batch show a cluster from several cameras?"""
    group: int
    """Neighbours in the global batch that one rank must take at once; 0: the whole batch."""


class PublishedSetting(NamedTuple):
    """A setting as published."""

    value: Any
    """As a recipe would write it."""
    source: str


class PublishedRecipe(NamedTuple):
    """What a publication says of a recipe."""

    settings: Mapping[str, PublishedSetting]
    """Dotted key -> value. A key that is not there was not published; the comment behind its value in the recipe says
    why it has that value."""
    data: str = ""
    """What was trained on; empty: not published."""


def by_source(source: str, values: Mapping[str, Any]) -> dict[str, PublishedSetting]:
    """Values that one source states. Files are those of the reference repositories."""
    return {key: PublishedSetting(value, source) for key, value in values.items()}


class Method(nn.Module, ABC, Generic[C]):
    """One objective: a `student` the optimizer sees, maybe a `teacher` only the moving average touches, and their loss.

    Both are submodules with an attribute `backbone`, a `VisionTransformer`, and maybe a `head`. A method without a
    teacher does not define it.

    What is asked of a method beside its loss has a default that suits one student; settings alone answer it, no network
    needs to be built. A module of `training/methods` with a subclass, or an entry point of another package
    (`registry.GROUP`), is all that makes a method known.
    """

    student: nn.Module
    teacher: nn.Module

    fine_tunes: ClassVar[bool] = False
    """Does it train on the images of a ReID data set, on top of what another method pre-trained? Its weights are of the
    method that they began with then."""
    task: ClassVar[str] = "zero-shot"
    """What scores of its weights are called: "zero-shot", "supervised", "usl"."""
    layouts: ClassVar[tuple[str, ...]] = ()
    """How the names of layouts of published files begin (`training/weights/published.py`) whose weights are of this
    method."""
    published: ClassVar[Mapping[str, PublishedRecipe]] = {}
    """Recipe -> what was published of it; the first is for architectures that have none of their own."""

    def __init__(self, config: C, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config: C = config
        self.precision: Precision = "fp32"

    @classmethod
    def settings_type(cls) -> type[MethodSettings]:
        """The class of its settings: the parameter that it or a class it derives from gives `Method`."""
        for kind in cls.__mro__:
            for base in kind.__dict__.get("__orig_bases__", ()):
                for given in get_args(base):
                    if isinstance(given, type) and issubclass(given, MethodSettings):
                        return given
        raise TypeError(f"{cls.__name__} does not say of which settings it is: Method[ITS_SETTINGS]")

    # -- what data it wants ---------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def views(config: C, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        """What the loader must make; picklable."""

    @staticmethod
    def by_identity(config: C) -> ByIdentity | None:
        """How batches are made up of identities; None: they are not, and labels are not needed."""
        del config
        return None

    @staticmethod
    def for_identities(config: C, count: int) -> C:
        """The settings for data of so many identities, where batches are made up of them. Raises ConfigError where they
        are for another number."""
        del count
        return config

    @staticmethod
    def by_cluster(config: C) -> ByCluster | None:
        """How pseudo labels are made of the data, for a method that learns from them; None: they are not."""
        del config
        return None

    @staticmethod
    def for_images(config: C, count: int) -> C:
        """The settings for so many training images, where they are clustered. Raises ConfigError where they are for
        another number."""
        del count
        return config

    # -- what it takes --------------------------------------------------------------------------------------------

    @staticmethod
    def parts(config: C) -> int:
        """Part tokens of the network that is evaluated and exported."""
        del config
        return 0

    @classmethod
    def workload(cls, config: C, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        """What a micro-batch of so many images is to its networks. By default the student sees every view whole;
        teacher, heads and loss are not counted."""
        spec = cls.views(config, views, backbone)
        stacks = []
        for group in spec.groups:
            patches = math.prod(side // backbone.patch for side in group.size)
            stacks.append(Stack(len(group.bands) * images, group.size, patches, 1 + cls.parts(config) + patches))
        return Workload(student=tuple(stacks), complete=False, products_complete=False)

    # -- what becomes of its weights ------------------------------------------------------------------------------

    @staticmethod
    def fusion(config: C) -> Fusion:
        """How CLS and part tokens, where there are any, are put together in the feature whose scores are quoted."""
        del config
        return "cat"

    @staticmethod
    def quoted_feature(parts: int, fusion: Fusion) -> str:
        """The feature whose scores are quoted, of a backbone with so many part tokens (`training/reid/embed.py` has all
        by name): where there are parts, CLS and their mean by `fusion` (PASS's tables rank by "cat"), else CLS."""
        return FEATURES[fusion] if parts else "cls"

    @staticmethod
    def fine_tuning_recipe(parts: int) -> str:
        """Name of the recipe that fine-tunes its weights, a backbone with so many part tokens."""
        return "supervised_pass" if parts else "supervised"

    @staticmethod
    def for_weights(config: C, parts: int) -> C:
        """The settings of fine-tuning that suit a backbone with so many part tokens."""
        del parts
        return config

    @classmethod
    def nearest_recipe(cls, run: Mapping[str, Any]) -> str:
        """The one of `published` that a run is beside, by its settings (dotted key -> plain value); empty: none is."""
        ending = SIZES.get(run["backbone.arch"], "")
        fitting = [name for name in cls.published if ending and name.endswith(f"_{ending}")]
        return next(iter([*fitting, *cls.published]), "")

    # -- the objective --------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """The loss of one micro-batch: all views, student and teacher, in one call."""

    def after_step(self, sums: dict[str, Tensor], progress: TrainingProgress) -> None:
        """Once per optimizer step, on every rank, with the sums of the global batch: centres, memories."""
        del sums, progress

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Per trainable parameter, by its name in `named_parameters()`."""

    @abstractmethod
    def backbone(self) -> VisionTransformer:
        """The network that is evaluated and exported."""

    def necks(self) -> TokenNecks | None:
        """The necks behind which features are scored; None: those of the backbone are scored."""
        return None

    def embedder(self) -> nn.Module:
        """The network whose features are scored and clustered: the backbone, with the necks where there are any."""
        necks = self.necks()
        return self.backbone() if necks is None else NeckedBackbone(self.backbone(), necks)

    def adopt_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Buffers whose size the run decides take that of a checkpoint about to be restored: name in `state_dict` ->
        shape."""
        del shapes

    def begin_epoch(self, labels_N: Tensor, features_NF: Tensor) -> None:
        """Take over the pseudo labels of an epoch, and what is made of the features that were clustered. On every rank;
        only where there is `by_cluster`."""
        raise TypeError(f"{type(self).__name__} makes pseudo labels (by_cluster) and does not take them over")

    def networks(self) -> dict[str, nn.Module]:
        """ "student", and "teacher" where there is one."""
        children = dict(self.named_children())
        return {name: children[name] for name in ("student", "teacher") if name in children}

    def centres(self) -> dict[str, Tensor]:
        """Buffers that training checkpoints of others keep of the loss, to go on with it: "centre_" and a token."""
        return {}

    def extra_exports(self) -> dict[str, dict[str, Tensor]]:
        """What an exported milestone has beside its backbone: name of a file (.safetensors) -> tensors."""
        return {}

    def couples_batch(self) -> bool:
        """Do the targets of one image depend on the others of its micro-batch?

        Then the same batch in another number of micro-batches has another loss, so gradients must not be accumulated.
        """
        return False
