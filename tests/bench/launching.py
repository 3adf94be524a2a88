"""What the thread that launches kernels loses to the loader beside it: threads of its interpreter, or processes.

    python -m tests.bench.launching [--rounds 7] [--rows 2000] [--launches 200000]

A fixed number of small operations of PyTorch, each as much Python and dispatch as the launch of a kernel, is timed with
no loader, beside one thread, and beside one process that make PASS's 11 views without end; the three take turns. Wall
time, as the lock of an interpreter costs no CPU time: on a machine that is busy otherwise the figures mean nothing, so
what the operations take beside another program that does nothing with the interpreter is printed too.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.stream.loader import Loader
from datapipe.stream.stream import Stream
from tests.bench.specs import pass_views
from tests.datapipe import crop_set
from training.config.bicubic import fastest

BATCH = 64


def launch(count: int) -> float:
    """Seconds that so many small operations take."""
    value, one = torch.zeros(4), torch.ones(4)
    began = time.perf_counter()
    for _ in range(count):
        value.add_(one)
    return time.perf_counter() - began


@contextmanager
def beside_loader(folder: Path, **makers: int) -> Iterator[None]:
    """A loader that makes batches as fast as it can, and a thread that takes them."""
    config = StreamConfig(threads=1, cache_dir=str(folder / "cache"), **makers)  # type: ignore[arg-type]
    stream = Stream(Manifest.load(str(folder / "set")), StorageConfig(), config)
    order, ended = Order(stream.rows, 0, config.block, config.window), threading.Event()
    with Loader(stream, order, pass_views("bicubic", colours=True), seed=0, global_batch=BATCH, rank=0, world=1,
                micro_batch=BATCH, config=config, resize=fastest()) as loader:  # fmt: skip
        made = threading.Event()

        def take() -> None:
            for _ in loader.after(0, 1 << 40):
                made.set()
                if ended.is_set():
                    return

        taker = threading.Thread(target=take)
        taker.start()
        made.wait()
        yield
        ended.set()
        taker.join()
    stream.close()


@contextmanager
def beside_another_program() -> Iterator[None]:
    """A process that keeps one core busy, and shares nothing with this one."""
    process = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True)
    process.start()
    yield
    process.kill()
    process.join()


@contextmanager
def alone() -> Iterator[None]:
    yield


def _busy() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--launches", type=int, default=200_000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crop_set.write(folder / "set", chosen.rows, per_shard=500)
        ways: dict[str, Callable[[], object]] = {
            "alone": alone, "beside another program": beside_another_program,
            "beside a thread": lambda: beside_loader(folder),
            "beside a process": lambda: beside_loader(folder, processes=1),
        }  # fmt: skip
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(chosen.rounds):
            for way, beside in ways.items():
                with beside():  # type: ignore[attr-defined]
                    spent[way].append(launch(chosen.launches) / chosen.launches)
    print("microseconds an operation: median (least to most), times alone")
    base = statistics.median(spent["alone"])
    for way, seconds in spent.items():
        middle = statistics.median(seconds)
        print(f"{way:<24}{1e6 * middle:8.2f} ({1e6 * min(seconds):.2f} to {1e6 * max(seconds):.2f})  "
              f"{middle / base:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
