"""The coordinator: one actor beside the driver, through which driver, controller and workers pass notes."""

import time
import uuid
from typing import Any, Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.train.watch.hang_detection import Pulse
from cluster.train.watch.restart_policy import Decision, Failure, Restarts
from datapipe.core.errors import UserError

NAMESPACE = "reid"

Word = Literal["go", "leave", "stop", "end"]
"""What workers are to do: "leave": save and make room, to be started anew; "stop": save and end the run; "end": end at
once, as others have taken their place."""


class Leaving(Exception):
    """A worker has saved and makes room; Ray Train starts the group anew."""


class WorkerLocation(NamedTuple):
    """Where a rank is."""

    rank: int
    node: str
    """Ray's id of the machine."""
    address: str
    pid: int

    @property
    def name(self) -> str:
        """The machine in a person's terms; several may share an address."""
        return f"{self.address} (node {self.node[:8]})"


class Notes(NamedTuple):
    """What the driver takes from the coordinator."""

    lines: list[str]
    failure: UserError | None
    ending: tuple[int, bool] | None
    """(steps done, complete) of the last group of workers that ended by itself."""
    restarts: list[dict[str, Any]]
    pulses: list[Pulse]
    places: dict[int, WorkerLocation]
    waiting_s: float
    """Since when there are no workers; 0 while there are."""
    stop: str
    """Why a worker's machine wants the whole run to stop; empty: it does not."""
    stepping: bool
    """Have the workers begun with a step, so that there is something to save?"""


class Situation(NamedTuple):
    """What the controller must know when workers have ended."""

    stopping: bool
    over: bool
    """A mistake that no restart mends has been met, or the run is complete."""
    leaving: str
    blame: Failure | None
    places: dict[int, WorkerLocation]
    step: int
    """The last one that workers told of; they do so now and then, not after every step."""
    saved: int
    """The step of the last checkpoint that they told of."""


class Coordinator:
    """The notes; runs as an actor that lives as long as the driver. A group is one start of all workers."""

    def __init__(self, saved: int, restarts: Restarts) -> None:
        self._counted = restarts
        self._lines: list[str] = []
        self._restarts: list[dict[str, Any]] = []
        self._failure: UserError | None = None
        self._ending: tuple[int, bool] | None = None
        self._stopping, self._stop_reason = False, ""
        self._group, self._step, self._saved = 0, saved, saved
        self._reason = "started"
        self.open()
        self._waiting_since: float | None = time.monotonic()

    # ------------------------------------------------------------------------------------------- by the controller

    def open(self) -> int:
        """A group's processes are there, and are about to meet; the group's number."""
        self._group += 1
        self._leaving, self._stepping, self._closed = "", False, False
        self._blame: Failure | None = None
        self._places: dict[int, WorkerLocation] = {}
        self._pulses: dict[int, tuple[Pulse, float]] = {}
        return self._group

    def place(self, places: list[WorkerLocation]) -> None:
        """Where the group's processes are."""
        self._places = {place.rank: place for place in places}
        self._waiting_since = None

    def close(self) -> None:
        """The group is gone, or being ended: whoever of it still lives is not heard, and never counts as hung."""
        self._closed = True
        self._pulses.clear()
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()

    def situation(self) -> Situation:
        over = self._failure is not None or (self._ending is not None and self._ending[1])
        leaving, blame = ("", None) if self._closed else (self._leaving, self._blame)  # of a group that was judged
        return Situation(self._stopping, over, leaving, blame, dict(self._places), self._step, self._saved)

    def follow(self, failure: Failure) -> Decision:
        """What follows a failure, which is why the next group is started; noted for the run's history."""
        nodes = {place.node for place in self._places.values()}
        decision = self._counted.decide(failure, saved=self._saved, nodes=len(nodes))
        self._restarts.append({
            "time": time.time(), "kind": failure.kind, "reason": failure.reason, "rank": failure.rank,
            "node": failure.node, "workers": len(self._places), "step": self._step, "saved": self._saved,
            "in_a_row": decision.row, "delay_s": decision.delay_s, "gave_up": decision.give_up is not None,
        })  # fmt: skip
        self._reason = f"restarted: {failure.reason}"
        if decision.give_up is not None:
            self.fail(decision.give_up)
        return decision

    def left(self) -> bool:
        """Have all ranks of the group ended, or was it never there?"""
        return not self._pulses

    # ------------------------------------------------------------------------------------------------- by workers

    def enter(self) -> tuple[int, str, bool]:
        """(group, why it was started, is there anything left to do), for a worker that begins."""
        return self._group, self._reason, self._failure is None

    def beat(self, group: int, pulse: Pulse) -> Word:
        """A rank lives."""
        if group != self._group:
            return "end"
        if not self._closed:
            self._pulses[pulse.rank] = pulse, time.monotonic()
        self._step = max(self._step, pulse.step)
        return "stop" if self._stopping else "leave" if self._leaving else "go"

    def gone(self, group: int, rank: int) -> Word:
        """A rank is done with its work."""
        if group == self._group:
            self._pulses.pop(rank, None)
        return "stop" if self._stopping else "leave"

    def saved(self, step: int) -> None:
        self._saved = max(self._saved, step)
        self._step = max(self._step, step)

    def stepping(self, group: int) -> None:
        """A rank begins with its first step."""
        self._stepping = self._stepping or group == self._group

    def show_line(self, line: str) -> None:
        self._lines.append(line)

    def fail(self, failure: UserError) -> None:
        """A mistake that no restart mends. The first one stays."""
        self._failure = self._failure or failure

    def end(self, step: int, complete: bool) -> None:
        self._ending = step, complete

    def blame(self, failure: Failure) -> None:
        """Who ended the group; the first one stays, as others fail for want of the first."""
        if not self._closed:
            self._blame = self._blame or failure

    def leave(self, reason: str) -> None:
        """All ranks are to save and make room. The first reason stays."""
        if not self._closed:
            self._leaving = self._leaving or reason

    def ask_stop(self, reason: str) -> None:
        """The machine of the driver itself will be taken away."""
        self._stop_reason = self._stop_reason or reason

    # --------------------------------------------------------------------------------------------- by the driver

    def stop(self) -> None:
        self._stopping = True

    def abandon(self) -> None:
        """The group has nobody that looks after it: where it still works, it ends."""
        self._group += 1
        self.close()

    def take(self) -> Notes:
        """Lines and restarts since the last call, and how all stands."""
        now = time.monotonic()
        lines, self._lines = self._lines, []
        restarts, self._restarts = self._restarts, []
        pulses = [
            pulse._replace(silent_s=now - heard, stood_s=pulse.stood_s + now - heard)
            for pulse, heard in self._pulses.values()
        ]
        waiting_s = 0.0 if self._waiting_since is None else now - self._waiting_since
        return Notes(lines, self._failure, self._ending, restarts, pulses, dict(self._places), waiting_s,
                     self._stop_reason, self._stepping)  # fmt: skip


def start_coordinator(saved: int, restarts: Restarts) -> tuple[str, Any]:
    """(name, actor handle) of a new coordinator on this machine. `saved`: step of the newest checkpoint or 0."""
    name = f"coordinator-{uuid.uuid4().hex[:12]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Coordinator).options(name=name, namespace=NAMESPACE, scheduling_strategy=here)
    return name, actor.remote(saved, restarts)


def find_coordinator(name: str) -> Any:
    """The handle of a coordinator, anywhere in the cluster."""
    return ray.get_actor(name, namespace=NAMESPACE)
