"""What the transcription of a published step is given: our own views and random numbers."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.bench.gpu.trial import Noise
from tests.bench.published_step import Drawn
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.methods.base import TrainingProgress, Views
from training.nn import positions
from training.nn.drop_path import draw_path_masks
from training.trainer.batch_to_device import BatchToDevice


def inputs(config: RunConfig, device: torch.device) -> Iterator[tuple[Views, Drawn, TrainingProgress]]:
    """What ours makes of the same batches: normalised views and the random numbers of the step, on the device."""
    clock, place = clock_of(config, 0), BatchToDevice(device, config.views.statistics)
    for batch in Noise(config, device).after(0, 10**9):
        views, progress = place(batch), clock.at(batch.start)
        yield views, _drawn(config, views, progress), progress


def _drawn(config: RunConfig, views: Views, progress: TrainingProgress) -> Drawn:
    def factors(kind: str, count: int) -> torch.Tensor | None:
        rates, purpose = config.backbone.drop_rates, f"drop_path/{kind}"
        drawn = draw_path_masks(rates, seed=progress.seed, purpose=purpose, position=views["position"], views=count)
        return None if drawn is None else drawn.to(views["weight"].device)

    if "region_a" not in views:
        return Drawn(factors("global", len(views["global"])), factors("local", len(views["local"])))
    given: Any = config.method
    box_a, box_b = views["boxes"].to(torch.float32)
    places, width = positions.in_frame(box_b, box_a, *config.backbone.grid), config.backbone.shape.width
    codes = [positions.sincos(places, own or width) for own in (given.pixel_width, given.feature_width)]
    return Drawn(factors("region_a", 1), codes=codes)
