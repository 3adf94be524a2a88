"""What machines ask of object storage: requests and bytes per image, counted in a simulation.

    python -m tests.bench.reading                          # LUPerson's number of crops on 1 to 64 machines
    python -m tests.bench.reading --cliffs                 # ever larger crops on one machine
    python -m tests.bench.reading --machines 64 --batch 4096

Order, shares of the ranks, block reader and disk cache are the real ones, and so is what decides how much is kept and
read ahead; the data set is made up. Its bytes are zeros, and fewer: sizes and limits are divided by SHRINK, so that the
caches of all machines fit on one disk. What is read ahead is there when it is wanted: how fast a store answers is not
simulated. Machines of eight ranks. Of more than --simulated machines so many are, evenly spaced, and stand for all.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import xxhash

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.index import Shard
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import PackedIndex
from datapipe.dataset.tar import layout
from datapipe.sampling.epoch_order import Order
from datapipe.sampling.rank_assignment import Assignment
from datapipe.storage.local import LocalStore
from datapipe.stream import block_reader, open_manifest
from datapipe.stream.loader import UNDER_WAY
from datapipe.stream.reading_plan import Readers, ReadingPlan, plan_reading
from datapipe.stream.stream import Stream

SHRINK = 256
"""Crops, gaps and caches are so many times smaller than they are said to be."""
MEMORY = Path("/dev/shm")
"""Where caches lie, if that is there."""
PER_SHARD = 10_000
RANKS_OF_A_MACHINE = 8
LUPERSON = 4_180_243
SIMULATED = 8
CLIFFS_KB = (4, 8, 11, 12, 16, 22, 24, 32, 48)
CLIFF_WINDOWS = 4


@dataclass
class Asked:
    """Of the store."""

    requests: int = 0
    bytes: int = 0
    waited_for: int = 0
    """Requests that were sent when a crop was wanted, not ahead of that."""
    images: int = 0

    def per_image(self, crop_bytes: float) -> tuple[float, float, float]:
        """(requests per 1,000 images, bytes per image as multiples of a crop, requests waited for per 1,000 images)."""
        each = 1_000 / self.images
        return each * self.requests, self.bytes / self.images / crop_bytes, each * self.waited_for


class CountingStore(LocalStore):
    """Shards full of zeros. Nothing is read."""

    asked = Asked()
    ahead = False

    def read(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        assert size is not None
        self.asked.requests += 1
        self.asked.bytes += size
        self.asked.waited_for += not self.ahead
        return bytes(size)


class Inline:
    """An executor that does what it is given at once."""

    def submit(self, work: Callable[..., object], *arguments: Any) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(work(*arguments))
        return done

    def map(self, work: Callable[..., object], *arguments: Any) -> Iterator[object]:
        return map(work, *arguments)

    def shutdown(self, **_: object) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class MadeUp:
    """A data set of so many crops of a mean size, with the spread that LUPerson's have."""

    rows: int
    crop_bytes: float

    @property
    def manifest(self) -> Manifest:
        starts = np.minimum(np.arange(-(-self.rows // PER_SHARD) + 1) * PER_SHARD, self.rows).tolist()
        taken = int(self.crop_bytes / SHRINK)
        shards = (
            Shard(f"shards/{number:06d}.tar", end - first, (end - first) * taken, f"{number:064x}", "", "")
            for number, (first, end) in enumerate(pairwise(starts))
        )
        return Manifest(tuple(shards), name="made", url="made-up://set")

    def order(self, config: StreamConfig) -> Order:
        """In which a run takes the crops."""
        return Order(self.rows, 0, config.block, config.window)

    @property
    def index(self) -> PackedIndex:
        sizes, offsets = _columns(self)
        starts = np.minimum(np.arange(-(-self.rows // PER_SHARD) + 1) * PER_SHARD, self.rows)
        hashes = np.array([xxhash.xxh3_64_intdigest(bytes(size)) for size in range(int(sizes.max()) + 1)], np.uint64)
        nobody = np.broadcast_to(np.int32(-1), self.rows)
        return PackedIndex(starts, offsets, 1, sizes, hashes[sizes], nobody, nobody, int(sizes.sum(dtype=np.int64)),
                           frozenset())  # fmt: skip


@lru_cache(maxsize=1)
def _columns(made: MadeUp) -> tuple[np.ndarray, np.ndarray]:
    """(sizes int32, offsets int64), shrunk."""
    spread = np.random.default_rng(0).normal(0.0, 0.45, made.rows)
    real = np.exp(spread - 0.45**2 / 2) * made.crop_bytes
    offsets = np.concatenate([layout(real[low : low + PER_SHARD])[0] for low in range(0, made.rows, PER_SHARD)])
    return np.maximum(1, np.rint(real / SHRINK)).astype(np.int32), offsets // SHRINK


@dataclass
class Machine:
    """One machine's stream over the data set, its cache in a folder of its own."""

    stream: Stream
    there: set[int] = field(default_factory=set)
    """Blocks that are known to be in the cache."""
    fetched: int = 0
    """Bytes when that was known: a block that comes may push others out."""

    @staticmethod
    def opened(made: MadeUp, config: StreamConfig, cache: Path, machines: int) -> "Machine":
        stream = opened_stream(made.manifest, replace(config, cache_dir=str(cache)), machines)
        reader = stream._now.reader
        for pool in (reader.ahead, reader._pool):
            if pool is not None:
                pool.shutdown()
        reader.ahead, reader._pool = reader.ahead and Inline(), Inline()  # type: ignore[assignment]
        return Machine(stream)

    def want(self, rows: np.ndarray) -> None:
        """Have these crops, in blocks as far as these are kept."""
        reader = self.stream._now.reader
        if reader.cache is not None:
            kept = reader.keeps(rows)
            for number in set(reader.blocks.of(rows[kept]).tolist()) - self.there:
                if not reader.cache.has(reader._key(number)):
                    reader._bring(number)
                self.there.add(number)
            if reader.bytes_read != self.fetched:
                self.there, self.fetched = set(), reader.bytes_read
            rows = rows[~kept]
        if len(rows):
            reader._fetch(np.unique(rows), map)

    def prepare(self, rows: np.ndarray, turns: np.ndarray) -> None:
        """What `Loader` asks a window ahead."""
        CountingStore.ahead = True
        self.stream.prepare(rows, turns)
        CountingStore.ahead = False


def opened_stream(manifest: Manifest, config: StreamConfig, machines: int) -> Stream:
    """As a run opens it on one of so many machines."""
    return Stream(manifest, StorageConfig(), config, Readers(machines, RANKS_OF_A_MACHINE * machines))


@dataclass
class Simulation:
    """Machines that train together."""

    made: MadeUp
    config: StreamConfig
    batch: int
    folder: Path
    at_most: int = SIMULATED
    """Machines that are simulated."""
    machines: list[Path] = field(default_factory=list)
    """Their caches, and where those of the others would be."""
    simulated: set[Path] = field(default_factory=set)

    def start(self, count: int) -> None:
        """A run begins on so many new machines."""
        self.machines = [self.folder / f"machine-{number}" for number in range(count)]
        self.simulated = set(self.machines[:: -(-count // self.at_most)])

    def lose(self, number: int) -> None:
        """A machine is gone; the others keep their caches and get other ranks."""
        self.simulated.discard(self.machines.pop(number))

    def run(self, stretches: Sequence[range]) -> list[Asked]:
        """What is asked of the store for the batches that begin in each of these stretches of positions, which follow
        one another: by the machines that are simulated, of so many images as are theirs. The processes are new."""
        count = len(self.machines)
        numbers = [number for number, cache in enumerate(self.machines) if cache in self.simulated]
        order, assignment = self.made.order(self.config), assignment_of(count, self.batch, self.config)
        small = replace(self.config, cache_mb=self.config.cache_mb / SHRINK, cache_gb=self.config.cache_gb / SHRINK)
        machines = [Machine.opened(self.made, small, self.machines[number], count) for number in numbers]
        window = self.config.window * self.config.block
        under_way = self.config.prefetch + UNDER_WAY
        distance = max(0, -(-window // self.batch) - under_way)
        known: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

        def work_out(start: int) -> None:
            """Each machine's samples of the batch that starts there, and their turns; they are told of it."""
            positions = np.arange(start, start + self.batch)
            samples, turns = order.samples(positions), order.turns(positions)
            node = np.zeros(self.batch, np.int64)
            if assignment.by_node:
                node = assignment.moved_to(order.blocks(samples))
            known[start] = [(samples[node == number], turns[node == number]) for number in numbers]
            for machine, (rows, own) in zip(machines, known[start], strict=True):
                machine.prepare(rows, own)

        found, worked_out = [], stretches[0].start
        for stretch in stretches:
            CountingStore.asked = Asked()
            for start in stretch[:: self.batch]:
                while worked_out <= start + distance * self.batch:
                    work_out(worked_out)
                    worked_out += self.batch
                over = known.pop(start - under_way * self.batch, None)
                for place, machine in enumerate(machines):
                    if over is not None:
                        machine.stream.passed(*over[place])
                    machine.want(known[start][place][0])
                    CountingStore.asked.images += len(known[start][place][0])
            CountingStore.asked.bytes *= SHRINK
            found.append(CountingStore.asked)
        for machine in machines:
            machine.stream.close()
        return found


def assignment_of(machines: int, batch: int, config: StreamConfig) -> Assignment:
    """How so many machines share batches."""
    nodes = tuple(np.repeat(np.arange(machines), RANKS_OF_A_MACHINE).tolist())
    return Assignment(-(-batch // len(nodes)), nodes, version=config.assignment_version)


def machines_per_block(order: Order, assignment: Assignment, batch: int, windows: int = 1) -> float:
    """Machines that read a block of the order's first windows, on average; counted by order and shares alone."""
    machines, read = max(assignment.nodes) + 1, [np.empty(0, np.int64)]
    for start in range(0, windows * order.block * order.window, batch):
        blocks = order.blocks(order.samples(np.arange(start, start + batch)))
        read.append(np.unique(blocks * machines + assignment.moved_to(blocks)))
    return len(np.unique(np.concatenate(read))) / (windows * order.window)


def simulated(made: MadeUp) -> ExitStack:
    """A context in which data sets are made up; `enter_context` of it gives nothing."""
    stack = ExitStack()
    index = made.index
    stack.enter_context(patch.object(open_manifest, "open_index", lambda *_: index))
    stack.enter_context(patch.object(open_manifest, "open_store", lambda *_: CountingStore("/")))
    stack.enter_context(patch.object(block_reader, "GAP_BYTES", block_reader.GAP_BYTES // SHRINK))
    return stack


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="reading_", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)


def epochs(
    made: MadeUp, config: StreamConfig, batch: int, machines: int, at_most: int = SIMULATED
) -> tuple[Asked, Asked, Asked]:
    """(epoch 1, the first half of epoch 2, the window after a machine was lost then)."""
    rows, window = made.rows // batch * batch, config.window * config.block // batch * batch
    middle = (rows + rows // 2) // batch * batch
    with simulated(made), _scratch() as folder:
        run = Simulation(made, config, batch, Path(folder), at_most)
        run.start(machines)
        first, second = run.run([range(rows), range(rows, middle)])
        if machines == 1:
            return first, second, Asked()
        run.lose(machines // 2)
        (lost,) = run.run([range(middle, middle + window)])
    return first, second, lost


def cliff(crop_kb: float, config: StreamConfig, batch: int, machines: int) -> tuple[ReadingPlan, Asked]:
    """(how it is read, what is asked for in windows after the first one), of crops of this size."""
    window = config.window * config.block
    made = MadeUp((CLIFF_WINDOWS + 1) * window, crop_kb * 1e3)
    plan = plan_reading(config, rows=made.rows, crop_bytes=made.crop_bytes, remote=True, machines=machines)
    with simulated(made), _scratch() as folder:
        run = Simulation(made, config, batch, Path(folder))
        run.start(machines)
        return plan, run.run([range(window), range(window, CLIFF_WINDOWS * window)])[1]


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """Print a table in Markdown, a line as soon as it is known."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def _figures(asked: Asked, crop_bytes: float) -> tuple[str, ...]:
    if not asked.images:
        return ("-",) * 3
    requests, size, waited = asked.per_image(crop_bytes)
    return f"{requests:.2f}", f"{size:.3f}", f"{waited:.2f}"


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reading", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rows", type=int, default=LUPERSON)
    parser.add_argument("--crop-kb", type=float, nargs="+", default=[9.0])
    parser.add_argument("--batch", type=int, default=1_024, help="images of a global batch (PASS, ViT-S: %(default)s)")
    parser.add_argument("--cache-gb", type=float, default=StreamConfig.cache_gb)
    parser.add_argument("--assignment-version", type=int, choices=(1, 2), default=StreamConfig.assignment_version)
    parser.add_argument("--simulated", type=int, default=SIMULATED, help="machines, at most (%(default)s)")
    parser.add_argument("--cliffs", action="store_true", help="ever larger crops, on the first number of machines")
    given = parser.parse_args()
    config = StreamConfig(cache_gb=given.cache_gb, assignment_version=given.assignment_version)
    if given.cliffs:
        sizes = given.crop_kb if given.crop_kb != [9.0] else CLIFFS_KB

        def by_size() -> Iterator[Sequence[str]]:
            for size in sizes:
                plan, asked = cliff(size, config, given.batch, given.machines[0])
                yield (f"{size:g}", f"{plan.window / 1e9:.2f}", f"{plan.kept:.2f}", f"{plan.ahead:.2f}",
                       *_figures(asked, size * 1e3))  # fmt: skip

        table(("kB a crop", "GB of a window", "kept", "ahead", "requests per 1,000 images", "bytes per byte of a crop",
               "requests waited for per 1,000"), by_size())  # fmt: skip
        return
    made = MadeUp(given.rows, given.crop_kb[0] * 1e3)

    def by_machines() -> Iterator[Sequence[str]]:
        for machines in given.machines:
            found = epochs(made, config, given.batch, machines, given.simulated)
            read = 1.0
            if machines > 1:
                shared = assignment_of(machines, given.batch, config)
                windows = made.rows // (config.window * config.block) or 1
                read = machines_per_block(made.order(config), shared, given.batch, windows)
            yield (str(machines), f"{read:.2f}",
                   *(figure for asked in found for figure in _figures(asked, made.crop_bytes)))  # fmt: skip

    names = ("requests per 1,000 images", "bytes per byte of a crop", "waited for per 1,000")
    head = (f"{when}: {name}" for when in ("epoch 1", "epoch 2", "a machine lost") for name in names)
    table(("machines", "that read a block", *head), by_machines())


if __name__ == "__main__":
    main()
