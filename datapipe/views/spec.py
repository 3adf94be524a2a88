"""What views a method asks for, group by group: sizes, crops, colours and masks, as plain settings.

Needs nothing that decodes or draws pictures; `make_views` carries it out.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datapipe.core.config import JitterConfig, Range, Size, ViewConfig
from datapipe.views.erasing import ErasingSpec
from datapipe.views.masking import MaskSpec

View = NDArray[np.uint8]
"""Pixels, [H, W, 3] or a stack of these."""
VERSION_OF_BICUBIC = 3
"""First version of the rules by which bicubic views are those of `datapipe.views.bicubic`; before, Pillow's."""
REDRAWS = 8
"""Crops drawn for a view that must lie near another one."""

Band = tuple[float, float]
"""(top, bottom) as shares of the image's height; (0, 1) is the whole image."""


@dataclass(frozen=True)
class Photometric:
    """What may happen to the colours of one view, in this order: jitter, grey, blur, solarise, erase.

    The plain floats are probabilities; `blur_sigma` is in pixels of the view, `erase_area` a share of it.
    """

    jitter: JitterConfig = JitterConfig(probability=0.0)
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0
    erase: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    erase_area: Range = (0.02, 0.3)


@dataclass(frozen=True)
class ViewGroup:
    """Views of one size: out[name] is uint8 [views, batch, height, width, 3].

    `scale` is the crop's area as a share of its band, `ratio` its width over height, `flip` a probability; `bands`
    and `photometric` have one entry per view.
    """

    name: str
    size: Size
    scale: Range
    ratio: Range
    flip: float
    bands: tuple[Band, ...]
    photometric: tuple[Photometric, ...]
    flip_with: str = ""
    """Groups that give the same name here flip together: one draw per image. Empty: each view by itself."""
    near: str = ""
    """A group before this one: crops are drawn again, up to REDRAWS times, until their overlap (intersection over
    union) with the first crop of that group is within `iou`. Empty: wherever they fall."""
    iou: Range = (0.0, 1.0)
    boxed: bool = False
    """Report where the crops of this group were cut."""
    pad: int | None = None
    """A number: `scale` and `ratio` do not apply. The whole image is resized to `size`, so many black pixels are put
    around it, and a piece of that size is cut at random."""

    def __post_init__(self) -> None:
        if len(self.bands) != len(self.photometric):
            raise ValueError(f"{self.name}: {len(self.bands)} bands but {len(self.photometric)} photometric settings")


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image, group by group. Picklable; methods make it, the loader carries it out."""

    groups: tuple[ViewGroup, ...]
    interpolation: Literal["bicubic", "linear"] = "bicubic"
    masks: tuple[MaskSpec, ...] = ()
    """One for each masked view: which of its patches are hidden from the student."""
    erasing: ErasingSpec | None = None
    """Rectangles that views lose after they are normalised."""
    version: Literal[1, 2, 3] = 3
    """Rules by which bands become rows, and bicubic resizing rounds: see `ViewConfig`."""

    def shape(self, group: ViewGroup, batch: int) -> tuple[int, int, int, int, int]:
        """[views, batch, height, width, 3]."""
        return len(group.bands), batch, *group.size, 3

    @property
    def boxed(self) -> int:
        """Views whose boxes are reported, in the order of the groups."""
        return sum(len(group.bands) for group in self.groups if group.boxed)


def multi_crop(config: ViewConfig, *, size: Size, local_size: Size, local_bands: tuple[Band, ...]) -> ViewSpec:
    """Two "global" views of the whole image and one "local" view per band (DINO: all (0, 1); PASS: three thirds)."""
    first, second, local = (
        Photometric(
            jitter=config.jitter,
            grey=config.grey,
            blur=config.blur[kind],
            solarise=config.solarise[kind],
            erase=config.erase[kind],
            blur_sigma=config.blur_sigma,
            erase_area=config.erase_area,
        )
        for kind in range(3)
    )
    whole: Band = (0.0, 1.0)
    pair = ViewGroup(
        name="global",
        size=size,
        scale=config.global_scale,
        ratio=config.global_ratio,
        flip=config.flip,
        bands=(whole, whole),
        photometric=(first, second),
    )
    small = ViewGroup(
        name="local",
        size=local_size,
        scale=config.local_scale,
        ratio=config.local_ratio,
        flip=config.flip,
        bands=local_bands,
        photometric=(local,) * len(local_bands),
    )
    groups = (pair, small) if local_bands else (pair,)
    return ViewSpec(groups, interpolation=config.interpolation, version=config.version)


@dataclass(frozen=True)
class RegionSpec:
    """How regions of an image are cut: area as a share of it, width over height, bounds on the overlap of two."""

    scale: Range
    ratio: Range
    iou: Range
    share_flip: bool
    """Mirror both regions or neither; otherwise each is drawn by itself."""


def regions(
    config: ViewConfig, law: RegionSpec, *, size: Size, pair: bool, masks: tuple[MaskSpec, ...] = ()
) -> ViewSpec:
    """One crop of an image, "region_a", or two, "region_b" too, with their boxes; never recoloured (PersonMAE)."""
    first = ViewGroup(
        name="region_a",
        size=size,
        scale=law.scale,
        ratio=law.ratio,
        flip=config.flip,
        bands=((0.0, 1.0),),
        photometric=(Photometric(),),
        flip_with="regions" if law.share_flip else "",
        boxed=True,
    )
    bounded = law.iou != (0.0, 1.0)
    second = replace(first, name="region_b", near="region_a" if bounded else "", iou=law.iou)
    return ViewSpec((first, second) if pair else (first,), interpolation=config.interpolation, masks=masks,
                    version=config.version)  # fmt: skip


def padded(config: ViewConfig, *, size: Size, pad: int) -> ViewSpec:
    """One view of the whole person, "image", moved by up to `pad` pixels: for fine-tuning (TransReID's)."""
    whole: Band = (0.0, 1.0)
    group = ViewGroup(name="image", size=size, scale=whole, ratio=whole, flip=config.flip, bands=(whole,),
                      photometric=(Photometric(),), pad=pad)  # fmt: skip
    return ViewSpec((group,), interpolation=config.interpolation, version=config.version)
