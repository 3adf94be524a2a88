"""Copies beside the computation: no byte is read before it has come, or overwritten before it was read."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from datapipe.stream.batch import Batch, LoaderCounters
from tests.support.streams import Races, Streams
from tests.support.trajectory import NoFaults
from training.core import device_copy
from training.core.device_copy import CopyStream
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.world import World
from training.engine.clock import Clock
from training.engine.settings import OptimisationConfig
from training.engine.stepper import Result
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.loop import Segment, TrainingRun, train

CPU = torch.device("cpu")
BATCH, MICRO, STEPS = 6, 2, 4
SLOTS = 2
"""Batches in memory of the loader's."""


class SlotLoader:
    """Batches of noise in two slots, each overwritten when the batch after the next is asked for."""

    def __init__(self, overwrites: Callable[[np.ndarray], None], *, prompt: bool = True) -> None:
        self.intake = LoaderCounters()
        self.made: list[np.ndarray] = []
        self._overwrites, self._prompt = overwrites, prompt
        self._slots = [np.zeros((2, BATCH, 4, 3, 3), np.uint8) for _ in range(SLOTS)]

    def ready(self) -> bool:
        return self._prompt

    def after(self, position: int, until: int) -> Iterator[Batch]:
        rows = np.arange(BATCH)
        for number, start in enumerate(range(position, until, BATCH)):
            slot = self._slots[number % SLOTS]
            self._overwrites(slot)
            slot[...] = np.random.default_rng(start).integers(0, 256, slot.shape)
            self.made.append(slot.copy())
            masks = slot[:, :, :2, :, 0] > 128
            boxes = np.broadcast_to(start + rows[:, None], (2, BATCH, 5)).copy()
            yield Batch({"global": slot}, rows, start + rows, np.full(BATCH, 1 / BATCH), rows + start, rows, start,
                        start + BATCH, masks=masks, boxes=boxes)  # fmt: skip


class Noted:
    """A stepper that computes with views a little, and keeps them."""

    names: list[str] = []
    scale = None

    def __init__(self) -> None:
        self.views: list[Any] = []

    def apply(self, *_: Any) -> None: ...

    def accumulation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, outcome: Any, *, last: bool) -> None:
        self.views.append({name: value.clone() for name, value in outcome.items()})

    def forward(self, views: Any, progress: Any) -> Any:
        return views

    def step(self) -> Any:
        return Result(0.0, {}, {}, torch.zeros(0), True, False)


class NoTeacher:
    """A method of which the loop wants nothing."""

    def networks(self) -> dict[str, Any]:
        return {}

    def after_step(self, *_: Any) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def run(streams: Streams, *, prompt: bool = True, micro: int = MICRO) -> tuple[Races, SlotLoader, Noted]:
    """The loop with the copies of a GPU; whatever may happen in the wrong order there is found."""
    races = Races(streams)
    loader, stepper = SlotLoader(races.host_writes, prompt=prompt), Noted()
    place = BatchToDevice(CPU)
    place._copies = CopyStream(CPU)
    training = TrainingRun(
        method=NoTeacher(), stepper=stepper, loader=loader, place=place, copies=place,  # type: ignore[arg-type]
        clock=Clock(BATCH, BATCH * STEPS, 1, seed=0), optimisation=OptimisationConfig(batch=BATCH), micro_batch=micro,
        checkpoints=None, host=LocalHost(), faults=NoFaults(), exchange=Exchange(World()),
    )  # fmt: skip
    with races:
        train(training, Segment(BATCH * STEPS))
    return races, loader, stepper


@pytest.mark.parametrize("micro", [MICRO, BATCH])
@pytest.mark.parametrize("prompt", [True, False])
def test_copies__no_slot_is_overwritten_before_it_was_read(streams: Streams, prompt: bool, micro: int) -> None:
    races, loader, stepper = run(streams, prompt=prompt, micro=micro)
    assert races.found == []
    views = torch.cat([part["global"] for part in stepper.views], dim=1)
    expected = np.concatenate(loader.made, axis=1)
    plain = BatchToDevice(CPU)._normalised(torch.from_numpy(expected))
    assert torch.equal(views, plain)
    assert torch.cat([part["label"] for part in stepper.views]).tolist() == list(range(BATCH * STEPS))
    for part in stepper.views:
        assert torch.equal(part["mask"].flatten().nonzero()[:, 0], part["hidden"])
        assert torch.equal(part["boxes"][0, :, 0], part["label"])
        assert torch.equal(part["weight"], torch.full((micro,), 1 / BATCH))


@pytest.mark.parametrize("lost", ["arrived", "read", "settle"])
def test_copies__each_of_the_waits_is_needed(streams: Streams, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    if lost == "settle":
        monkeypatch.setattr(BatchToDevice, "settle", lambda _: None)
    else:
        real = device_copy.DeviceSlot.__init__

        def without(slot: device_copy.DeviceSlot, device: torch.device) -> None:
            real(slot, device)
            vars(slot)[lost].record = lambda _: None  # everybody takes it for past

        monkeypatch.setattr(device_copy.DeviceSlot, "__init__", without)
    assert run(streams)[0].found


def test_copies__small_ones_are_one_and_start_before_their_turn(streams: Streams) -> None:
    races, _, _ = run(streams, micro=BATCH)
    copies = [size for size in races.copies if size]
    assert len(copies) == 2 * STEPS, "one of all that is small, one of each group of views"
    races, _, _ = run(streams)
    views = 2
    assert len([size for size in races.copies if size]) == (1 + views) * STEPS * BATCH // MICRO
