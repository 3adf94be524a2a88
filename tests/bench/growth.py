"""What grows with the number of crops: time and memory of planning, of a whole ingestion, and of opening.

    python -m tests.bench.growth plan 100000000
    python -m tests.bench.growth ingest 100000 200000 400000
    python -m tests.bench.growth open 100000000

Each figure is of a process of its own. Ingestion gets a few real JPEGs under ever new names, many times over: every
step does its full work, and duplicates are as frequent as can be. Of what is opened there are indexes alone, a few
under very many names, on a disk of this machine; ranks open it together.
"""

import argparse
import multiprocessing
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from datapipe.core.config import ShardConfig, StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.remarks import Remarks
from datapipe.dataset.tar import member_bytes
from datapipe.ingest.pipeline import ingest_sources
from datapipe.ingest.shard_plan import Candidates, plan_shards, repeated
from datapipe.sampling.epoch_order import Order
from datapipe.sources.base import Crop
from datapipe.stream.stream import Stream
from tests.bench.crops import crops
from tests.bench.measure import cpu_s
from tests.bench.opening import data_set
from tests.bench.scale import Scale

SOURCES = 20
"""Groups within which near duplicates are sought when planning."""
COPIES = 0.1
"""Share of the planned crops whose bytes, and of as many again whose looks, are those of another one."""
UNIT = 2_000
KINDS_OF_SHARDS = 32
RANKS, BATCH, LOCATED = 8, 4_096, 10
"""Processes that open a data set together, and batches of which each locates its part."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Grown:
    """What one run took."""

    rows: int
    seconds: float
    cpu_s: float
    peak_mb: float
    """Of the largest process."""
    what: str

    def __str__(self) -> str:
        each = self.cpu_s / self.rows * 1e6
        return (
            f"{self.rows:>12,} rows: {self.seconds:8.1f} s, {self.cpu_s:8.1f} CPU-s, {each:7.2f} CPU-us per row, "
            f"peak {self.peak_mb:,.0f} MB; {self.what}"
        )


def plan(rows: int) -> Grown:
    """Order, cuts, duplicates and id of crops that were never there."""
    made = _candidates(rows)
    return _measured(rows, lambda: _planned(made))


def ingest(rows: int) -> Grown:
    """The whole way, with as many processes as there are cores."""
    cache = Scale().cache
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="growth-", dir=cache))
    source = RepeatedCrops(str(crops("small", Scale()).files), rows)

    def work() -> str:
        with redirect_stderr(StringIO()):
            done = ingest_sources([source], str(folder / "out"), ShardConfig(), StorageConfig())
        marked = done.manifest.table(["duplicate_of", "near_of"])
        return (
            f"{len(done.manifest.shards)} shards, {rows - marked['duplicate_of'].null_count:,} exact and "
            f"{rows - marked['near_of'].null_count:,} near duplicates"
        )

    try:
        return _measured(rows, work)
    finally:
        shutil.rmtree(folder)


def opened(rows: int) -> Grown:
    """Opening a data set: once to pack it, then again on a machine that has nothing yet, then by all ranks together."""
    cache = Scale().cache
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="opening-", dir=cache))
    try:
        data_set(folder / "set", rows, kinds=KINDS_OF_SHARDS)
        address = f"local://{folder}/set"  # fetched, as from object storage
        (packing,) = _together(1, address, str(folder / "one"))
        (fetching,) = _together(1, address, str(folder / "other"))
        ranks = _together(RANKS, address, str(folder / "other"))
        size = sum(path.stat().st_size for path in (folder / "set").glob("packed-*"))
    finally:
        shutil.rmtree(folder)
    what = (
        f"that was packing into {size / 1e6:,.0f} MB; {fetching.seconds:.1f} s to fetch and open; then {RANKS} ranks "
        f"together in at most {max(rank.seconds for rank in ranks):.1f} s, at most "
        f"{max(rank.private_mb for rank in ranks):,.0f} MB of private memory more in each"
    )
    return Grown(rows, packing.seconds, packing.cpu_s, max(packing.peak_mb, fetching.peak_mb), what)


@dataclass(frozen=True)
class Opened:
    """What opening took in a process that does nothing else."""

    seconds: float
    cpu_s: float
    private_mb: float
    """Private memory after some batches were located, over that before."""
    peak_mb: float
    """Resident memory at its highest until it was open, over that before."""


def _together(ranks: int, address: str, cache: str) -> list[Opened]:
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("fork")) as processes:
        return list(processes.map(open_one, range(ranks), [ranks] * ranks, [address] * ranks, [cache] * ranks))


def open_one(rank: int, ranks: int, address: str, cache: str) -> Opened:
    """Open a data set, and find where the crops of this rank's part of some batches are."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, before, begin, cpu = held("VmRSS"), private_mb(), monotonic(), cpu_s()
    stream = Stream(Manifest.load(address), StorageConfig(), StreamConfig(cache_dir=cache, cache_mb=0))
    seconds, used, reader = monotonic() - begin, cpu_s() - cpu, stream._now.reader
    peak_mb = (held("VmHWM") - resident) / 1e6
    order = Order(stream.rows, 0, stream.config.block, stream.config.window)
    for batch in range(LOCATED):
        places = np.arange(BATCH * rank // ranks, BATCH * (rank + 1) // ranks) + batch * BATCH
        rows = np.sort(order.samples(places))
        reader.blocks.start(rows)
        reader.places.offset(rows)
        stream.labels(rows)
    return Opened(seconds, used, private_mb() - before, peak_mb)


def held(name: str) -> int:
    """A line of this process's status in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def private_mb() -> float:
    """Megabytes that only this process has, those aside that the system can drop as they are those of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_Dirty: +(\d+) kB", lines, re.MULTILINE)) / 1024


@dataclass(frozen=True)
class Stretch:
    """A unit: the crops [first, end)."""

    first: int
    end: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class RepeatedCrops:
    """The JPEGs of a folder over and over, each time under a name of its own."""

    folder: str
    count: int
    label: str = "repeated"

    def units(self, remarks: Remarks | None = None) -> Iterator[Stretch]:
        mean = sum(map(len, _jpegs(self.folder))) // len(_jpegs(self.folder))
        for first in range(0, self.count, UNIT):
            end = min(first + UNIT, self.count)
            yield Stretch(first, end, (end - first) * mean, f"{first}-{end}")

    def unit(self, fields: dict[str, Any]) -> Stretch:
        return Stretch(**fields)

    def read(self, unit: Stretch, remarks: Remarks | None = None) -> Iterator[Crop]:
        jpegs = _jpegs(self.folder)
        for number in range(unit.first, unit.end):
            yield Crop(self.label, f"{number:09d}.jpg", jpegs[number % len(jpegs)], pid=number // 50, frame=number)


@lru_cache(maxsize=1)
def _jpegs(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]


def _candidates(rows: int) -> Candidates:
    random = np.random.default_rng(0)
    made = Candidates.room(rows)
    for start in range(0, rows, _BLOCK):
        part = slice(start, min(start + _BLOCK, rows))
        size = part.stop - part.start
        for column in (made.rank, made.key, made.content, made.dhash, made.facts):
            column[part] = random.integers(0, 2**64, column[part].shape, np.uint64)
        made.group[part] = random.integers(1, SOURCES + 1, size, np.uint64)
        made.taken[part] = member_bytes(np.exp(random.normal(8.2, 0.5, size)).astype(np.int64))
        copies = int(COPIES * size)
        made.content[part][:copies] = made.content[part][copies : 2 * copies]
        flips = np.uint64(1) << random.integers(0, 64, (2, copies)).astype(np.uint64)
        made.dhash[part][:copies] = made.dhash[part][-copies:] ^ flips[0] ^ flips[1]
        made.group[part][:copies] = made.group[part][-copies:]
    return made


def _planned(made: Candidates) -> str:
    assert repeated(made) is None
    found = plan_shards(made, ShardConfig())
    return f"{found.shards:,} shards, {len(found.exact.places):,} exact and {len(found.near.places):,} near duplicates"


def _measured(rows: int, work: Callable[[], str]) -> Grown:
    begin, cpu = monotonic(), cpu_s()
    what = work()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Grown(rows, monotonic() - begin, cpu_s() - cpu, peak / 1024, what)


KINDS: dict[str, Callable[[int], Grown]] = {"plan": plan, "ingest": ingest, "open": opened}


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("what", choices=tuple(KINDS))
    parser.add_argument("rows", nargs="+", type=int)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            print(process.submit(KINDS[arguments.what], rows).result(), flush=True)


if __name__ == "__main__":
    main()
