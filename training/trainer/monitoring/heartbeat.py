"""What every rank leaves behind: when the stages of its start were over, signs of life, its share of the time."""

import json
import os
import socket
import time
from collections.abc import Callable

import psutil

from datapipe.stream.batch import Batch
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder, as_json
from training.core.world import World
from training.engine.stepper import Result
from training.methods.base import Progress
from training.trainer.monitoring.stragglers import Pace, Share

HEARTBEAT_S = 0.5
"""Seconds between signs of life; on object storage they arrive as seldom as other growing files."""


class Startup:
    """Unix times at which the stages of this rank's start were over. Made when `pretrain` begins."""

    def __init__(self) -> None:
        self.times = {"process": psutil.Process().create_time(), "imported": time.time()}
        """"process": when the operating system started it; "imported": code is loaded, the ranks have met."""

    def reached(self, stage: str) -> None:
        """The stage is over."""
        self.times[stage] = time.time()


class Watch:
    """Signs of life of every rank in ranks/rank_00.json, all ranks' times in ranks/pace.jsonl, and what `also` does.
    Called after each step, on every rank."""

    def __init__(self, folder: RunFolder, world: World, config: RunConfig, pace: Pace) -> None:
        self.folder, self.world, self.pace = folder, world, pace
        self.timeout_s = config.cluster.collective_timeout_s
        self.also: list[Callable[[int, Batch], None]] = []
        """Called after each step with the steps done and its batch."""
        self._steps = 0
        self.folder.write_soon(*self._life(0), hurry=True)

    def __call__(self, progress: Progress, batch: Batch, result: Result) -> None:
        done = progress.step + 1
        self._steps += 1
        if self._steps == 1:
            self.world.expect_within(self.timeout_s)  # imports and compilation are behind all ranks
        shares = self.pace.step(done, batch.waited_s)
        if shares and self.world.leads:
            self._share(done, shares)
        for note in self.also:
            note(done, batch)
        if time.monotonic() - self._said > HEARTBEAT_S:
            self.folder.write_soon(*self._life(done))

    def _share(self, done: int, shares: list[Share]) -> None:
        """Seconds per step of every rank by itself, and the part of the step that it waited for data."""
        waits = [share.waited_s / share.step_s for share in shares]
        line = {"step": done - 1, "own_s": [share.own_s for share in shares], "wait_share": waits}
        self.folder.append("ranks/pace.jsonl", json.dumps(line))

    def _life(self, step: int) -> tuple[str, str]:
        """The file that says that this rank lives, and what it says."""
        self._said = time.monotonic()
        life = {"pid": os.getpid(), "host": socket.gethostname(), "world": self.world.size, "step": step,
                "time": time.time()}  # fmt: skip
        return f"ranks/rank_{self.world.rank:02d}.json", as_json(life)
