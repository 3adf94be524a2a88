"""Values that change over a run, as pure functions of how far it has come.

A step may be a fraction: schedules hang on samples seen, so that another batch size or world size changes nothing but
the number of points at which they are read. Reference: cosine_scheduler in TransReID-SSL `dino/utils.py` and the
temperature schedule in `dino/main_dino.py`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise


def warmup_cosine(
    step: float, *, base: float, final: float, total_steps: float, warmup_steps: float = 0.0, start: float = 0.0
) -> float:
    """Linear from `start` to `base`, then half a cosine towards `final`.

    The warm-up's last step and the cosine's first both have the value `base`; the last step of all stays slightly
    above `final`, as in the reference:

        step < warmup_steps:   start + (base - start) * min(1, step / (warmup_steps - 1))
        otherwise:             final + (base - final) * (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    """  # noqa: E501
    if step < warmup_steps:
        last = warmup_steps - 1
        share = min(step / last, 1.0) if last > 0 else 0.0
        return start + (base - start) * share
    cosine_steps = total_steps - warmup_steps
    share = min((step - warmup_steps) / cosine_steps, 1.0) if cosine_steps > 0 else 1.0
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))


def epochwise(epoch: int, *, epochs: float, warmup_epochs: float) -> tuple[float, float, float]:
    """Shares of the learning rate that warm-up starts from, of the peak and of the final one in that of an epoch.

    timm's CosineLRScheduler as TransReID drives it (PASS `PASS_transreid/solver/cosine_lr.py` _get_lr): it is stepped
    after an epoch, so that the first one trains with the warm-up's start, and counts the cosine from 0, so that the
    peak is never reached. A group's own factor belongs to its peak alone.

        epoch < warmup_epochs:   start + (peak - start) * epoch / warmup_epochs
        epoch < epochs:          final + (peak - final) * (1 + cos(pi * epoch / epochs)) / 2
        otherwise:               final
    """
    if epoch < warmup_epochs:
        risen = epoch / warmup_epochs
        return 1 - risen, risen, 0.0
    left = 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
    return 0.0, left, 1 - left


def teacher_temperature(epoch: int, *, warmup: float, final: float, warmup_epochs: int) -> float:
    """Linear over `warmup_epochs` points from `warmup` to `final`, one per epoch; then `final`."""
    if epoch >= warmup_epochs:
        return final
    return warmup + (final - warmup) * (epoch / (warmup_epochs - 1) if warmup_epochs > 1 else 0.0)


def grown(epoch: int, *, epochs: float) -> float:
    """Share that grows linearly over the first `epochs` epochs, one value per epoch, and stays 1.

    min(1, (epoch + 1) / epochs); the factor of BootMAE's feature loss (`run_pretraining.py` train_one_epoch).
    """
    return min(1.0, (epoch + 1) / epochs) if epochs > 0 else 1.0


def along(points: Sequence[tuple[float, float]], epoch: float) -> float:
    """Linear between (epoch, value) points, which are in order; constant before the first and after the last."""
    for (before, low), (after, high) in pairwise(points):
        if before <= epoch < after:
            return low + (high - low) * (epoch - before) / (after - before)
    return points[0][1] if epoch < points[0][0] else points[-1][1]
