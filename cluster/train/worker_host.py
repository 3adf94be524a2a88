"""A worker's host under Ray: its life, its machine's end, and the words of the driver."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.callback import WorkerCallback

from cluster.train.coordinator import Word, WorkerLocation
from cluster.train.hang_detection import Pulse
from training.config.cluster import ClusterConfig
from training.core.host import Doing
from training.core.preemption_notice import Notice
from training.core.step_phase import Whereabouts
from training.core.world import World

POLL_S = 0.5
"""Seconds between signs of life, each of which brings back the driver's word."""
PREEMPTION = 2
"""Ray's number for "this machine will be taken away"."""
GRACE_S = 120
"""Seconds that a machine has after a notice, as far as Ray is told; clouds give 30 to 120."""

_terminated = threading.Event()


class TakeSigterm(WorkerCallback):
    """Lets a worker process live on after SIGTERM, SIGUSR1 or SIGHUP until its state is saved. Ray runs it in the main
    thread, which training is not in; a second signal ends the process."""

    def after_init_train_context(self) -> None:
        _terminated.clear()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, _receive)


def _receive(number: int, _: object) -> None:
    if _terminated.is_set():
        os._exit(128 + number)
    _terminated.set()


class RayHost:
    """What `training` asks of a rank's place and tells it; a thread carries it to the coordinator and back."""

    def __init__(self, coordinator: Any, group: int, world: World, config: ClusterConfig, *, embedded: bool) -> None:
        """`embedded`: Ray lives in the driver's process, so that no other machine could go on."""
        context = ray.get_runtime_context()
        self.where = WorkerLocation(world.rank, context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())
        self._coordinator, self._group, self._world, self._embedded = coordinator, group, world, embedded
        self._word: Word = "go"
        self._first: int | None = None
        """Steps that were done when this attempt began."""
        self._whereabouts = Whereabouts()
        self._stepping = False
        self._done = threading.Event()
        watched = config.notice if world.local_rank == 0 else ""
        self._notice = Notice(watched, every_s=config.notice_every_s, callback=self._going)
        threading.Thread(target=self._live, name="signs of life", daemon=True).start()

    def _live(self) -> None:
        while not self._done.is_set():
            try:
                self._word = ray.get(self._coordinator.beat.remote(self._group, self._pulse()))
            except (ray.exceptions.RayError, RuntimeError):
                return  # the driver is gone, and this process will be ended with it
            if self._word == "end":
                os._exit(1)  # its controller died, and another group works on the same run
            self._pass_on()
            self._done.wait(POLL_S)

    def _pass_on(self) -> None:
        """Tell why all must leave, if this process has been told to. The coordinator keeps the first reason."""
        if _terminated.is_set():
            ray.get(
                self._coordinator.leave.remote(f"rank {self._world.rank} on {self.place()} was told to end (SIGTERM)")
            )

    def _pulse(self) -> Pulse:
        where = self._whereabouts.now()
        begun = self._first is not None and where.step > self._first
        return Pulse(self._world.rank, where.step, where.doing, where.stood_s, 0.0, begun, where.marks)

    def _going(self, words: str) -> None:
        """This machine will be taken away: everybody saves, and Ray starts nothing here any more."""
        reason = f"{self.place()} will be taken away ({words})"
        if self._embedded:
            self._coordinator.ask_stop.remote(reason)
            return
        self._coordinator.leave.remote(reason)
        deadline_ms = round((time.time() + GRACE_S) * 1_000)
        GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(
            self.where.node, PREEMPTION, reason, deadline_ms
        )

    def close(self) -> Word:
        """The work is over, well or not: no more signs of life. What is to follow."""
        self._done.set()
        self._notice.close()
        self._pass_on()
        word: Word = ray.get(self._coordinator.gone.remote(self._group, self._world.rank))
        return word

    def place(self) -> str:
        return self.where.name

    def alive(self, step: int, doing: Doing) -> None:
        self._begin(step)
        self._whereabouts.at(step, doing)

    def launched(self, step: int, doing: Doing, reached: Callable[[], bool]) -> None:
        self._begin(step)
        self._whereabouts.launched(step, doing, reached)

    def _begin(self, step: int) -> None:
        if self._first is None:
            self._first = step

    def stepping(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._coordinator.stepping.remote(self._group)

    def preempted(self) -> bool:
        return self._word != "go" or _terminated.is_set()

    def saved(self, step: int) -> None:
        if self._world.is_leader:
            self._coordinator.saved.remote(step)

    def show_line(self, line: str) -> None:
        self._coordinator.show_line.remote(line)
