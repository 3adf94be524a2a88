"""Where a rank is, by what its GPU has done and not by what was launched."""

import torch

from datapipe.core.config import StorageConfig
from training.core.exchange import Exchange
from training.core.host import Doing, LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.step_phase import Whereabouts
from training.core.world import World
from training.trainer.monitoring.stragglers import StragglerMonitor


class Event:
    """What of a torch.cuda.Event is used; `happened` when the GPU comes to it."""

    def __init__(self) -> None:
        self.happened = self.broken = False

    def query(self) -> bool:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.happened


def _place(whereabouts: Whereabouts) -> tuple[int, Doing, int]:
    return whereabouts.now()[:3]


def test_whereabouts__follow_the_gpu_not_the_launches() -> None:
    found = Whereabouts()
    found.at(7, "data")
    begin, end = Event(), Event()
    found.launched(7, "forward", begin.query)
    found.launched(7, "backward", end.query)
    assert _place(found) == (7, "data", 0)
    begin.happened = True
    assert _place(found) == (7, "forward", 1)
    assert _place(found) == (7, "forward", 1)  # the program is in the backward pass long since
    end.happened = True
    assert _place(found) == (7, "backward", 2)
    found.at(8, "data")
    assert _place(found) == (8, "data", 0)


def test_whereabouts__tell_micro_batches_apart_and_keep_their_order() -> None:
    found, events = Whereabouts(), [Event() for _ in range(4)]
    doings: tuple[Doing, ...] = ("forward", "backward", "forward", "backward")
    for event, doing in zip(events, doings, strict=True):
        found.launched(0, doing, event.query)
    events[0].happened = events[2].happened = True
    assert _place(found) == (0, "forward", 1)
    events[1].happened = True
    assert _place(found) == (0, "forward", 3)


def test_whereabouts__a_device_in_an_error_state_has_come_no_further() -> None:
    found, event = Whereabouts(), Event()
    event.broken = True
    found.launched(0, "forward", event.query)
    assert _place(found) == (0, "data", 0)


class Told(LocalHost):
    def __init__(self) -> None:
        super().__init__()
        self.found = Whereabouts()

    def alive(self, step: int, doing: Doing) -> None:
        self.found.at(step, doing)

    def launched(self, step: int, doing: Doing, reached: object) -> None:
        self.found.launched(step, doing, reached)  # type: ignore[arg-type]


class Recorded(Event):
    """As the timer makes them."""

    made: list["Recorded"] = []

    def __init__(self, **_: object) -> None:
        super().__init__()
        Recorded.made.append(self)

    def record(self) -> None:
        pass


def test_pace__tells_events_on_a_gpu_and_places_on_a_cpu(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    for device in ("cuda", "cpu"):
        Recorded.made.clear()
        method, host = torch.nn.Identity(), Told()
        world, folder = World(device=torch.device(device)), RunFolder(str(tmp_path), StorageConfig())
        StragglerMonitor(method, host, world, folder, Exchange(world))  # type: ignore[arg-type]
        method(torch.zeros(1))
        if device == "cpu":
            assert host.found.now().doing == "backward" and not Recorded.made
            continue
        assert host.found.now().doing == "data"
        for event, doing in zip(Recorded.made, ("forward", "backward"), strict=True):
            event.happened = True
            assert host.found.now().doing == doing
