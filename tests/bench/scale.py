"""How much work a run of the benches does: enough for steady figures by default, next to nothing in tests."""

from dataclasses import dataclass, replace
from pathlib import Path

from datapipe.core.resource_limits import available_cores
from tests.support.golden import ROOT


@dataclass(frozen=True)
class Scale:
    """Sizes of all benches. One round of one contender takes a quarter of a second to two seconds of CPU time."""

    cache: Path = ROOT / ".bench"
    """Where the rendered crops are kept between runs."""
    rounds: int = 5
    """Counted rounds; one before them warms up."""
    crops: int = 1536
    """Rendered crops of each kind."""
    images: int = 48
    """Crops that get PASS's 11 views, per round."""
    batch: int = 256
    """Images in one batch of a loader."""
    workers: int = min(4, available_cores())
    """Threads of our loader and processes of the others; 0 makes the others work in this process."""
    loader_peers: bool = True
    """Compare with litdata and mosaic streaming too, where they are installed."""
    order_rows: int = 10**8
    opened_rows: int = 4_180_000
    """Crops of the data set that is opened: LUPerson's number."""
    queries: int = 1_500
    gallery: int = 20_000
    channels: int = 384
    looped: int = 300
    """Queries that the loop of argsorts gets: its time is proportional to them."""
    clustered: int = 8_000
    """Images whose clustering is measured once."""
    clustered_looped: int = 1_500
    """Images that are clustered by the loop, too: it holds three matrices of them."""
    usl_images: int = 640
    """Crops of an epoch of training without labels."""
    usl_iterations: int = 10
    usl_batch: int = 64
    step_images: int = 4
    """Images of a training step."""
    step_tiny: bool = False
    """Take two narrow blocks on small images in place of ViT-S."""


TOY = Scale(
    rounds=1,
    crops=24,
    images=2,
    batch=8,
    workers=0,
    loader_peers=False,
    order_rows=10**5,
    opened_rows=25_000,
    queries=30,
    gallery=200,
    channels=8,
    looped=30,
    clustered=80,
    clustered_looped=60,
    usl_images=64,
    usl_iterations=1,
    usl_batch=8,
    step_images=2,
    step_tiny=True,
)
"""For the test: every line runs, no figure means anything."""


def full(scale: Scale) -> Scale:
    """Retrieval and clustering at MSMT17's size, training steps of 16 images."""
    sizes = {"queries": 11_659, "gallery": 82_161, "channels": 768, "clustered": 32_621, "clustered_looped": 6_000}
    return replace(scale, **sizes, step_images=16)
