"""What both sides of a comparison have to make."""

from typing import Literal

from datapipe.core.config import JitterConfig, ViewConfig
from datapipe.views.spec import Photometric, ViewGroup, ViewSpec, multi_crop

GLOBAL, LOCAL = (256, 128), (128, 64)
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.1, 0.8)
"""PASS's, of the image and of the band (scripts vit-{s,b}_full_lup-pass.sh)."""
BANDS = ((0.0, 0.5),) * 3 + ((0.25, 0.75),) * 3 + ((0.5, 1.0),) * 3

ONE_SCALE, ONE_RATIO = (0.4, 1.0), (0.375, 0.667)
"""Of the single crop in the loader bench; a person's proportions, so that nearly every first try fits."""

Interpolation = Literal["bicubic", "linear"]


def pass_views(interpolation: Interpolation, *, colours: bool) -> ViewSpec:
    """PASS's 11 views; without colours only cut, resized and flipped."""
    config = ViewConfig(global_scale=GLOBAL_SCALE, local_scale=LOCAL_SCALE, interpolation=interpolation)
    if not colours:
        config = ViewConfig(
            global_scale=GLOBAL_SCALE,
            local_scale=LOCAL_SCALE,
            interpolation=interpolation,
            grey=0.0,
            jitter=JitterConfig(probability=0.0),
            blur=(0.0, 0.0, 0.0),
            solarise=(0.0, 0.0, 0.0),
        )
    return multi_crop(config, size=GLOBAL, local_size=LOCAL, local_bands=BANDS)


def one_view() -> ViewSpec:
    """One random resized crop to 256 x 128, linear, never flipped."""
    group = ViewGroup(
        name="one",
        size=GLOBAL,
        scale=ONE_SCALE,
        ratio=ONE_RATIO,
        flip=0.0,
        bands=((0.0, 1.0),),
        photometric=(Photometric(),),
    )
    return ViewSpec((group,), interpolation="linear")
