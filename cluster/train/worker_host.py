"""A worker's host under Ray: its life, its machine's end, and the words of the driver."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.core.ray_internals import drain
from cluster.train import standby
from cluster.train.coordinator import Word, WorkerLocation
from cluster.train.watch import early_signs
from cluster.train.watch.hang_detection import Pulse
from training.config.cluster import ClusterConfig
from training.core.host import Doing
from training.core.preemption_notice import Notice
from training.core.step_phase import Whereabouts
from training.core.world import World

POLL_S = 0.5
"""Seconds between signs of life, each of which brings back the driver's word."""
FORESEE_S = 1.0
"""Seconds between questions whether a machine is drained."""
MOST_A_SECOND = 256
"""Such questions that Ray Train's actor for them is asked by all ranks together."""
GRACE_S = 120
"""Seconds that a machine has after a notice, as far as Ray is told; clouds give 30 to 120."""

_terminated = threading.Event()


def hear_signals() -> None:
    """In a worker's main thread, which training is not in: SIGTERM, SIGUSR1 and SIGHUP let the process live on until
    its state is saved; a second one ends it."""
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
        self._whereabouts, self._advance = Whereabouts(), early_signs.Advance()
        early_signs.end()
        self._stepping = False
        self._done = threading.Event()
        watched = config.notice if world.local_rank == 0 else ""
        self._to_stand_by = world.local_size if config.standby and world.local_rank == 0 else 0
        """Processes that are to be started ahead of need once this rank has made a step."""
        self._notice = Notice(watched, every_s=config.notice_every_s, callback=self._going)
        threading.Thread(target=self._live, name="signs of life", daemon=True).start()
        threading.Thread(target=self._foresee, name="drained machines", daemon=True).start()

    def _live(self) -> None:
        while not self._done.is_set():
            try:
                self._word = ray.get(self._coordinator.beat.remote(self._group, self._pulse()))
            except (ray.exceptions.RayError, RuntimeError):
                return  # the driver is gone, and this process will be ended with it
            if self._word == "end":
                os._exit(1)  # its controller died, and another group works on the same run
            self._pass_on()
            self._prepare_restart()
            self._done.wait(POLL_S)

    def _foresee(self) -> None:
        """Ask Ray Train whether a machine of the run is drained, until one is. All ranks are asked together, which
        costs each of them a message; training does not wait for it."""
        from ray import train

        while not self._done.wait(max(FORESEE_S, self._world.size / MOST_A_SECOND)):
            try:
                info = train.get_preemption_info()
            except (ray.exceptions.RayError, RuntimeError):
                return  # the group is being ended
            if info is None:
                continue
            if self._world.is_leader:
                nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
                left = f" in {info.deadline_ms / 1_000 - time.time():.0f} s" if info.deadline_ms else ""
                self._coordinator.leave.remote(f"machine {nodes} is drained and will be taken away{left}")
            return

    def _pass_on(self) -> None:
        """Tell why all must leave, if this process has been told to. The coordinator keeps the first reason."""
        if _terminated.is_set():
            ray.get(
                self._coordinator.leave.remote(f"rank {self._world.rank} on {self.place()} was told to end (SIGTERM)")
            )

    def _prepare_restart(self) -> None:
        """Once the start is over."""
        if self._to_stand_by and self._pulse().begun:
            standby.replenish(self._to_stand_by)
            self._to_stand_by = 0

    def _pulse(self) -> Pulse:
        where = self._whereabouts.now()
        begun = self._first is not None and where.step > self._first
        if begun:
            return Pulse(self._world.rank, where.step, where.doing, where.stood_s, 0.0, True, where.marks)
        done, stood_s = self._advance.look()
        stood_s = min(stood_s, where.stood_s)
        return Pulse(self._world.rank, where.step, where.doing, stood_s, 0.0, False, where.marks, str(done))

    def _going(self, words: str) -> None:
        """This machine will be taken away: everybody saves, and Ray starts nothing here any more."""
        reason = f"{self.place()} will be taken away ({words})"
        if self._embedded:
            self._coordinator.ask_stop.remote(reason)
            return
        self._coordinator.leave.remote(reason)
        deadline_ms = round((time.time() + GRACE_S) * 1_000)
        drain(ray.get_runtime_context().gcs_address, self.where.node, reason, deadline_ms)

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
