"""A recipe's own loop on one device, over batches of noise or of a loader: stepper, placing, checkpoints and EMA as in
training."""

import copy
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import torch

from datapipe.storage import Store
from datapipe.stream.batch import Batch, LoaderCounters
from training.checkpoint import Checkpoints
from training.config.batch_split import split_of
from training.config.build import fake_batch, make_stepper, view_spec
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.precision import Precision
from training.core.world import World
from training.engine.stepper import Result
from training.methods.base import Method, TrainingProgress
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.loop import BatchSource, Segment, TrainingRun, train
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.nonfinite import Faults, describe

DISTINCT = 3
"""Batches of noise that are made; they come in turn."""


class NotFinite(Exception):
    """A loss or a gradient that is not finite, which no loss scale mends."""


class Refusing(Faults):
    """Ends the run at the first step that is not finite: there is nothing to go back to."""

    def __init__(self) -> None:
        """No run folder, no other ranks."""

    def handle(self, progress: TrainingProgress, batch: Batch, result: Result, names: list[str]) -> None:
        raise NotFinite(f"step {progress.step + 1}: {describe(result, names)}")


class Noise:
    """A loader of noise: the same batches on every device, a function of the recipe's seed and the step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.intake = LoaderCounters()
        self._config, self._pinned = config, device.type == "cuda"
        self._split = split_of(config, 1)
        self._made: Callable[[int], Batch] = lru_cache(maxsize=DISTINCT)(self._make)

    def after(self, position: int, until: int) -> Iterator[Batch]:
        """Batches from there on, as `datapipe.stream.loader.Loader.after` gives them."""
        size = self._config.optimisation.batch
        for start in range(position, until, size):
            places, began = np.arange(start, start + size), monotonic()
            made = self._made(start // size % DISTINCT)
            waited = monotonic() - began
            yield replace(made, start=start, after=start + size, position=places, sample=places, waited_s=waited)

    def ready(self) -> bool:
        """Batches are made at once, or were made before."""
        return True

    def _make(self, number: int) -> Batch:
        config = replace(self._config, seed=self._config.seed + number)
        batch = fake_batch(view_spec(config), self._split, config)
        return replace(batch, views={name: self._placed(pixels) for name, pixels in batch.views.items()})

    def _placed(self, pixels: np.ndarray) -> np.ndarray:
        """In page-locked memory where there is a GPU, as the loader's slots are."""
        return torch.from_numpy(pixels).pin_memory().numpy() if self._pinned else pixels


class Loaded(NamedTuple):
    """Batches of a data set."""

    loader: BatchSource
    rows: int
    """Crops of the data set: an epoch, unless the recipe states another one."""
    about: dict[str, Any]
    """What checkpoints repeat."""


class Trial(Observer):
    """The run of one recipe, whose batches are one micro-batch each, so far as it has come."""

    def __init__(
        self,
        config: RunConfig,
        initial: Method,
        device: torch.device,
        *,
        precision: Precision,
        store: Store | None = None,
        data: Loaded | None = None,
    ) -> None:
        """`initial` stays as it is. `store`: where checkpoints go; None: nowhere. `data`: None for noise."""
        optimisation = replace(config.optimisation, precision=precision)
        config = replace(config, optimisation=optimisation)
        world = World(device=device)
        self.losses: list[float] = []
        self.waited_s: list[float] = []
        """What each step waited for its batch."""
        self.each_step: Callable[[], None] = lambda: None
        """Called after each step, when all of it has been launched."""
        self.batch, self.position = optimisation.batch, 0
        self.method = copy.deepcopy(initial).to(device)
        self.method.precision = precision
        split = split_of(config, 1)
        data = data or Loaded(Noise(config, device), 0, _about(config))
        checkpoints = None if store is None else Checkpoints(store, config.checkpoints, world, about=data.about)
        self._host = LocalHost()
        place = BatchToDevice(device, config.views.statistics)
        self.run = TrainingRun(
            method=self.method, stepper=make_stepper(config, self.method, world, split), loader=data.loader,
            place=place, copies=place if device.type == "cuda" else None,
            clock=clock_of(config, data.rows), optimisation=optimisation,
            micro_batch=split.micro_batch, checkpoints=checkpoints, host=self._host,
            faults=Refusing(), exchange=Exchange(world), observers=[self],
        )  # fmt: skip

    def until(self, step: int, *, save: bool = False) -> None:
        """So many steps in all, by `loop.train`; its end is saved where that is asked for."""
        kept = self.run.checkpoints
        self.run.checkpoints = kept if save else None
        self.position, _ = train(self.run, Segment(step * self.batch), position=self.position)
        self.run.checkpoints = kept

    def stop(self) -> None:
        """Ends `until` after this step, as SIGTERM ends a run: with a save, where one is asked for."""
        self._host.received = signal.SIGTERM

    def resume(self) -> None:
        """Go on from the newest checkpoint in the store, and from nothing that is here."""
        assert self.run.checkpoints is not None
        with torch.no_grad():
            for value in self.method.state_dict().values():
                value.zero_()
        self.position, found = self.run.checkpoints.restore(self.run.stepper)
        assert found is not None, "the checkpoint was not found"

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, in host memory."""
        return {name: value.detach().cpu().clone() for name, value in self.method.state_dict().items()}

    def step(self, step: StepDone) -> None:
        self.losses.append(step.result.loss)
        self.waited_s.append(step.batch.waited_s)
        self.each_step()


def _about(config: RunConfig) -> dict[str, object]:
    """What a checkpoint says of a run that has no data set."""
    return {"manifest": "noise", "manifest_rows": 0, "seed": config.seed, "batch": config.optimisation.batch}
