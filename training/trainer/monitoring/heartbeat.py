"""What every rank leaves behind: when the stages of its start were over, signs of life, its share of the time."""

import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder, as_json
from training.core.world import World
from training.trainer.monitoring.observer import Observer, StepDone

HEARTBEAT_S = 0.5
"""Seconds between signs of life; on object storage they arrive as seldom as other growing files."""


class Startup:
    """Unix times at which the stages of this rank's start were over. Made when `pretrain` begins."""

    over = False
    """Are steps about to begin?"""

    def __init__(self) -> None:
        self.times = {"process": psutil.Process().create_time(), "imported": time.time()}
        """"process": when the operating system started it; "imported": code is loaded, the ranks have met."""

    def reached(self, stage: str) -> None:
        """The stage is over."""
        self.times[stage] = time.time()


class Heartbeat(Observer):
    """Signs of life of every rank in ranks/rank_00.json; the first step ends the patience of a start."""

    def __init__(self, folder: RunFolder, world: World, config: RunConfig) -> None:
        self.folder, self.world = folder, world
        self.timeout_s = config.cluster.collective_timeout_s
        self._steps = 0
        self._writer = ThreadPoolExecutor(1, "heartbeat")  # a disk takes milliseconds to keep a file
        self._written: Future[None] | None = None
        self.folder.write_soon(*self._life(0), hurry=True)

    def step(self, step: StepDone) -> None:
        self._steps += 1
        if self._steps == 1:
            self.world.expect_within(self.timeout_s)  # imports and compilation are behind all ranks
        if time.monotonic() - self._reported_at > HEARTBEAT_S and (self._written is None or self._written.done()):
            self._raise()
            self._written = self._writer.submit(self.folder.write_soon, *self._life(step.done))

    def close(self) -> None:
        self._raise()
        self._writer.shutdown()

    def _raise(self) -> None:
        """What went wrong when the last sign was written."""
        if self._written is not None:
            self._written.result()

    def _life(self, step: int) -> tuple[str, str]:
        """The file that says that this rank lives, and what it says."""
        self._reported_at = time.monotonic()
        life = {"pid": os.getpid(), "host": socket.gethostname(), "world": self.world.size, "step": step,
                "time": time.time()}  # fmt: skip
        return f"ranks/rank_{self.world.rank:02d}.json", as_json(life)
