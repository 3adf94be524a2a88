"""What a run will still stand still for: checkpoints, scores, pseudo labels. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from datapipe.core.randomness import Ints
from training.trainer.monitoring.throughput import Pause


@dataclass(frozen=True)
class Pauses:
    """The steps after which a run pauses, by what for; each in order, [pauses]."""

    saves: Ints
    scores: Ints
    labels: Ints
    save_every_s: float = 0.0
    """Seconds after which it saves at the latest; 0: the steps alone tell."""

    def left(self, step: int, training_s: float) -> dict[Pause, float]:
        """How many are to come when so many steps are done, those right after this step among them. `training_s`:
        seconds of training that are left."""
        later: dict[Pause, float] = {
            "saves": _from(self.saves, step), "scores": _from(self.scores, step), "labels": _from(self.labels, step)
        }  # fmt: skip
        if self.save_every_s:
            later["saves"] = max(later["saves"], training_s / self.save_every_s)
        return later


def pauses(
    saves: Ints, *, segments: Collection[int] = (), scores: Collection[int] = (), labels: Collection[int] = (),
    save_every_s: float = 0.0,
) -> Pauses:  # fmt: skip
    """`saves`: steps at which checkpoints are due; `segments`: those at which a segment ends, which is saved, too."""
    ended, scored, labelled = (np.array(sorted(steps), np.int64) for steps in (segments, scores, labels))
    return Pauses(np.union1d(saves, ended), scored, labelled, save_every_s)


def _from(steps: Ints, step: int) -> int:
    return len(steps) - int(np.searchsorted(steps, step))
