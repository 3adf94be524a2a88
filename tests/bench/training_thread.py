"""What the thread that launches kernels does beside launching them, in a simulated world of many ranks.

    python -m tests.bench.training_thread [--ranks 8 64 512] [--rows 100000000] [--batch 4096] [--steps 200]

One rank takes its steps through the code of the loop: the loader hands over batches, numbers are exchanged, observers
are told. The other ranks are recorded: what each would contribute to the all-reduces is worked out beforehand by the
same code, and their sum is replayed. No network is simulated, so what a collective takes on the wire is not counted,
nor what other threads do: the figures are CPU milliseconds of this one thread.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from time import thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.index import Shard
from datapipe.sampling.epoch_order import Order
from datapipe.storage.local import LocalStore
from datapipe.stream.batch import Batch, LoaderCounters
from datapipe.stream.block_reader import BlockReader, Places
from datapipe.stream.loader import Loader
from datapipe.stream.memory_cache import MemoryCache
from datapipe.stream.stream import Fetched
from datapipe.views.spec import Photometric, ViewGroup, ViewSpec
from tests.datapipe import crop_set
from training.core import exchange as exchange_module
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.param_groups import StepSettings
from training.engine.stepper import Result
from training.methods.base import TrainingProgress
from training.trainer.agreement import Stop
from training.trainer.dataset_renewal import DatasetRenewal
from training.trainer.monitoring.heartbeat import Heartbeat
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.monitoring.recorder import Recorder
from training.trainer.monitoring.stragglers import WINDOW_STEPS, StragglerMonitor
from training.trainer.monitoring.throughput import RankCounters

RANKS_OF_A_MACHINE = 8
SPEC = ViewSpec((ViewGroup("one", (8, 4), (0.5, 1.0), (0.4, 0.6), 0.5, ((0.0, 1.0),), (Photometric(),)),), "linear")
METRICS = {name: 0.5 for name in (
    "loss_cls", "loss_part", "target_entropy", "uniform_entropy", "target_information", "feature_cosine",
    "feature_rank", "student_teacher_cosine", "images_compared", "teacher_temp",
)}  # fmt: skip
"""As many numbers as a method records."""


class SimulatedWorld(World):
    """A rank of a world whose other ranks are not there."""

    def all_gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def broadcast(self, value: Any) -> Any:
        return value

    def nodes(self) -> tuple[int, ...]:
        return tuple(rank // self.local_size for rank in range(self.size))


def world_of(ranks: int, rank: int = 0) -> SimulatedWorld:
    """Machines of eight ranks."""
    here = min(ranks, RANKS_OF_A_MACHINE)
    return SimulatedWorld(rank, ranks, rank % here, here)


@dataclass
class Collectives:
    """Stands in for the asynchronous all-reduce: records what ranks send, or replays the sum of what was recorded."""

    recording: bool = True
    sums: dict[int, Tensor] = field(default_factory=dict)
    """By the length of what is sent: all ranks send as much in the same step."""
    count: int = 0
    numbers: int = 0
    """That were sent so far."""
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    """That were sent last."""

    def __call__(self, values: Tensor, device: torch.device) -> "Collectives":
        self.count += 1
        self.numbers += len(values)
        if self.recording:
            self.sums[len(values)] = self.sums.get(len(values), torch.zeros_like(values)) + values
        else:
            values.copy_(self.sums[len(values)])
        self.values = values
        return self

    def wait(self) -> Tensor:
        return self.values

    @contextmanager
    def installed(self) -> Iterator["Collectives"]:
        """For as long as the context lasts all-reduces of exchanges come here."""
        with patch.object(exchange_module, "LateSum", self):
            yield self


class Rank:
    """The loop's bookkeeping of one rank, made of the parts that the loop makes it of."""

    def __init__(self, world: World, folder: RunFolder, *, records: bool) -> None:
        """`records`: with what writes into the run folder, too."""
        host, method = LocalHost(), nn.Identity()
        self.exchange = Exchange(world)
        pace = StragglerMonitor(method, host, world, folder, self.exchange)  # type: ignore[arg-type]
        self.observers: list[Observer] = [pace]
        if records:
            loader: Any = SimpleNamespace(stream=SimpleNamespace(renewed=0, manifests=()))
            data: Any = SimpleNamespace(sets=())
            config: Any = SimpleNamespace(cluster=SimpleNamespace(collective_timeout_s=600.0))
            leading = [Recorder(folder, about={}, total_steps=10**6)] if world.is_leader else []
            renewal = DatasetRenewal(loader, data, Any, folder, world)  # type: ignore[arg-type]
            self.observers = [*leading, Heartbeat(folder, world, config), pace, renewal]
        self.stop, self.tally = Stop(host, self.exchange), RankCounters(self.exchange)
        self.counters = LoaderCounters(0, 10**9, 900, 1000, 12.5, 30.5, 0)
        self.batch = Batch({}, *[np.empty(0, np.int64)] * 2, np.empty(0), *[np.empty(0, np.int64)] * 2, 0, 4096)
        self.result = Result(1.0, {}, METRICS, torch.ones(150), True, False)
        self._steps = 0

    def receive(self) -> None:
        self.exchange.receive()

    def note(self) -> None:
        self.tally.note(0.01, self.counters)

    def observe(self) -> None:
        step = self._steps
        progress = TrainingProgress(4096 * step, step, 0, step / 10**6, 10**6, 10**3, 0)
        done = StepDone(progress, StepSettings(1e-3, 0.04, 0.996), self.batch, self.result, self.tally.latest)
        for observer in self.observers:
            observer.step(done)
        self._steps += 1

    def send(self) -> None:
        self.exchange.send()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """What a step consists of, in its order."""
        return {"receive": self.receive, "tally": self.note, "records": self.observe, "send": self.send}


def recorded(ranks: int, folder: RunFolder, collectives: Collectives) -> None:
    """Have every rank take the steps of a window: in the last one they send more than in the others."""
    for number in range(ranks):
        rank = Rank(world_of(ranks, number), folder, records=False)
        for step in range(WINDOW_STEPS):
            rank.note()
            rank.observe()
            if step in (0, WINDOW_STEPS - 1):
                rank.send()


def bookkeeping(ranks: int, steps: int, *, leader: bool = True) -> dict[str, float]:
    """CPU milliseconds a step, by part, of the thread that takes the steps."""
    with tempfile.TemporaryDirectory() as folder, Collectives().installed() as collectives:
        run = RunFolder(folder, StorageConfig())
        recorded(ranks, run, collectives)
        collectives.recording = False
        rank = Rank(world_of(ranks, 0 if leader else 1), run, records=True)
        for observer in rank.observers:
            observer.begin()
        spent = dict.fromkeys(rank.parts, 0.0)
        for step in range(WINDOW_STEPS + steps):
            for name, part in rank.parts.items():
                began = thread_time()
                part()
                if step >= WINDOW_STEPS:
                    spent[name] += thread_time() - began
        for observer in rank.observers:
            observer.close()
    return {name: 1e3 * seconds / steps for name, seconds in spent.items()}


class MadeUpStream:
    """A data set of so many rows on a store that is read ahead from; each crop is the same one, and nothing is read."""

    def __init__(self, rows: int, config: StreamConfig) -> None:
        self.rows, self.config, self.reads_ahead = rows, config, True
        self.replaced = self.bytes_read = self.renewed = 0
        self.cached = 0, 0
        self._jpeg = next(crop_set.jpegs(1))
        shards = -(-rows // 10_000)
        starts = np.minimum(np.arange(shards + 1) * 10_000, rows)
        constant = np.broadcast_to(np.int32(len(self._jpeg)), rows)
        places = Places((Shard("a.tar", 1, 1, "0" * 64, "a.parquet", "0" * 64),) * shards, starts, constant, constant,
                        np.broadcast_to(np.uint64(0), rows))  # fmt: skip
        self._reader = BlockReader(
            LocalStore("/"), places, block=config.block, cache=MemoryCache(0), in_flight=0, ahead=1.0
        )
        self._reader.ahead = SimpleNamespace(submit=lambda *_: None)  # type: ignore[assignment]
        self.prepared_by: set[int] = set()

    def fetch(self, samples: np.ndarray) -> Fetched:
        return Fetched(samples.copy(), [self._jpeg] * len(samples))

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(rows), -1), np.full(len(rows), -1)

    def prepare(self, samples: np.ndarray, turns: np.ndarray) -> None:
        self.prepared_by.add(get_ident())
        self._reader.prepare(samples, turns)

    def passed(self, samples: np.ndarray, turns: np.ndarray) -> None:
        self._reader.passed(turns)


def hand_over(ranks: int, steps: int, *, rows: int, batch: int) -> float:
    """CPU milliseconds a step that the thread which asks for batches spends on that."""
    config = StreamConfig(threads=1)
    stream = MadeUpStream(rows, config)
    world = world_of(ranks)
    per = -(-batch // ranks)
    with Loader(
        stream, Order(rows, 0, config.block, config.window), SPEC, seed=0, global_batch=batch, rank=0, world=ranks,  # type: ignore[arg-type]
        micro_batch=per, config=config, nodes=world.nodes(),
    ) as loader:  # fmt: skip
        batches = loader.after(10 * batch, (10 + 10 + steps) * batch)
        for _ in range(10):
            next(batches)
        spent = 0.0
        for _ in range(steps):
            began = thread_time()
            next(batches)
            spent += thread_time() - began
    return 1e3 * spent / steps


def main() -> None:
    """Print a line for each number of ranks."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training_thread", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = ("ranks", "hand-over of a batch", "bookkeeping, leading rank", "of another rank", "leading rank's, by part")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for ranks in arguments.ranks:
        over = hand_over(ranks, arguments.steps, rows=arguments.rows, batch=arguments.batch)
        leads, follows = (bookkeeping(ranks, arguments.steps, leader=leader) for leader in (True, False))
        parts = ", ".join(f"{name} {spent:.2f}" for name, spent in leads.items())
        print(
            f"| {ranks} | {over:.2f} | {sum(leads.values()):.2f} | {sum(follows.values()):.2f} | {parts} |", flush=True
        )


if __name__ == "__main__":
    main()
