"""What a loader hands over: a rank's rows of a global batch, and what it took to make them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from datapipe.core.randomness import Floats, Ints
from datapipe.views.erasing import Erasures
from datapipe.views.masking import Masks
from datapipe.views.spec import View


class LoaderCounters(NamedTuple):
    """What a loader has done so far, in all."""

    replaced: int = 0
    """Samples whose crop was broken, so that another took its place."""
    fetched: int = 0
    """Bytes asked of the storage."""
    cached: int = 0
    """Crops that came from a cache ..."""
    sought: int = 0
    """... of so many that one was asked for."""
    reading_s: float = 0.0
    """Seconds that its threads spent on getting bytes ..."""
    making_s: float = 0.0
    """... and on making views of them."""
    renewed: int = 0
    """How often another version of a data set has taken the place of the one before."""


@dataclass
class Batch:
    """This rank's rows of one global batch, which covers the stream positions [start, after).

    `views[name]` is uint8 [V, n, H, W, 3]; the other arrays are [n]. Padding rows have sample, position, label and
    camera -1, weight 0 and black views; real rows weigh 1 / (after - start). `label` and `camera` are those of the
    crop that was really read; -1 where unknown. `waited_s`: seconds the consumer stood still for this batch.

    Where the method asks for them: `masks` bool [V, n, rows, columns], True where a patch is hidden (padding: False),
    `boxes` int64 [V, n, 5]: top, left, height, width in the source image and flipped (padding: 0), and `erasures`: what
    the only view loses once it is normalised (padding: nothing).
    """

    views: dict[str, View]
    sample: Ints
    position: Ints
    weight: Floats
    label: Ints
    camera: Ints
    start: int
    after: int
    waited_s: float = 0.0
    masks: Masks | None = None
    boxes: Ints | None = None
    erasures: Erasures | None = None

    def micro_batches(self, rows: int) -> Iterator["Batch"]:
        """The batch in pieces of `rows`, as views of its arrays: nothing is copied."""
        for low in range(0, len(self.sample), rows):
            yield self._part(slice(low, low + rows))

    def _part(self, rows: slice) -> "Batch":
        return replace(
            self,
            views={name: array[:, rows] for name, array in self.views.items()},
            sample=self.sample[rows],
            position=self.position[rows],
            weight=self.weight[rows],
            label=self.label[rows],
            camera=self.camera[rows],
            masks=None if self.masks is None else self.masks[:, rows],
            boxes=None if self.boxes is None else self.boxes[:, rows],
            erasures=None if self.erasures is None else self.erasures.rows(rows),
        )
